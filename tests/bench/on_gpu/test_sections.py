"""Every section of `bench gpu`, gone through on a CPU: tiny sizes, Triton's interpreter, a stand-in for the device."""

from __future__ import annotations

import os
import time

import pytest

from bench import gpu
from bench.harness.rows import Row
from bench.on_gpu import attention, ceilings, correct, decoding, losses, profiles, quantized, row_wise, steps
from bench.on_gpu.device import Rehearsal
from bench.on_gpu.section import Bench, Section, tiny

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")


def rehearsed(section: Section) -> tuple[list[Row], list[str]]:
    lines = list(gpu.measured(section, Bench(Rehearsal(), tiny()), time.time() + 3600))
    return [Row.model_validate(one["row"]) for one in lines if "row" in one], [x["note"] for x in lines if "note" in x]


def table_of(rows: list[Row]) -> str:
    return "\n".join(text for name, text in gpu.tables(rows).items() if name != "gpu-runs")


def test_steps_of_all_contenders_have_the_same_loss() -> None:
    rows, notes = rehearsed(steps.SECTION)
    assert not notes
    assert {one.contender for one in rows} == {"embedgrad", "peft", "transformers", "floor"}
    ways = [str(one.case["way"]) for one in rows if one.contender == "embedgrad"]
    assert ways == ["step", "pipelined", "device", "loss_and_grad"]
    expected, *others = (one.more["loss"] for one in rows if "loss" in one.more)
    assert len(others) == 3  # loss_and_grad, PEFT, transformers
    assert others == pytest.approx([expected] * 3, rel=1e-4)
    assert "| 1.5B bf16 | 4/3/2 | `all` |" in table_of(rows)


@pytest.mark.slow
def test_steps_with_other_policies_weights_and_models() -> None:
    rows, notes = rehearsed(steps.MORE)
    assert not notes
    found = {(one.case["model"], one.case["weights"], one.case.get("policy")) for one in rows}
    assert {policy for _, _, policy in found} == {"all", "layer", None}
    assert {weights for _, weights, _ in found} == {"bf16", "int8", "int4"}
    assert len({model for model, _, _ in found}) == 2
    assert "| 7B bf16 |" in table_of(rows)


def test_every_kernel_is_launched_in_every_type_and_right() -> None:
    rows, notes = rehearsed(correct.SECTION)
    assert not notes
    wide, half = rows  # Triton's interpreter gets bfloat16 wrong
    assert wide.more["never"] == []
    assert wide.more["wrong"] == half.more["wrong"] == {}
    assert len(wide.more["launched"]) >= 20
    assert "| float32 |" in table_of(rows)


@pytest.mark.parametrize(
    ("section", "contenders"),
    [
        (ceilings.SECTION, {"torch"}),
        (decoding.SECTION, {"embedgrad", "transformers"}),
        (profiles.SECTION, {"embedgrad"}),
        (losses.SECTION, {"embedgrad", "torch", "two cuBLAS products"}),
        pytest.param(
            attention.SECTION, {"embedgrad", "torch math, dense copies", "FlexAttention, same mask"},
            marks=pytest.mark.slow,
        ),
        pytest.param(quantized.SECTION, {"embedgrad", "cuBLAS, bf16"}, marks=pytest.mark.slow),
        (row_wise.SECTION, {"embedgrad", row_wise.COPY}),
        (row_wise.SMALL, {"embedgrad", "torch's fused AdamW, no projection", "torch's attention on copies"}),
    ],
    ids=lambda given: given.name if isinstance(given, Section) else "",
)  # fmt: skip
def test_a_section_gives_rows_and_a_table(section: Section, contenders: set[str]) -> None:
    rows, notes = rehearsed(section)
    assert {one.contender for one in rows} == contenders
    assert all("not installed" in note for note in notes)
    assert all(one.question == "gpu" and one.case["device"] == "cuda" and one.median > 0 for one in rows)
    text = table_of(rows)
    assert text.count("\n|") >= 2
    assert len({line.count("|") for line in section.table(rows).splitlines()}) == 1  # every line has every column


def test_what_pytest_says_becomes_a_row() -> None:
    text = "..F\nFAILED tests/a.py::test_b[1] - AssertionError: x\n1 failed, 302 passed, 19 skipped in 32.97s"
    row = correct.row_of_tests("tests/kernels", text, 33.0)
    assert row.more["counts"] == {"failed": 1, "passed": 302, "skipped": 19}
    assert row.more["failed"] == ["FAILED tests/a.py::test_b[1] - AssertionError: x"]
    stopped = correct.row_of_tests("tests/kernels", "....\nERROR the tests were stopped after 9 s", 9.0)
    assert stopped.median == 0
    assert stopped.more["failed"] == ["ERROR the tests were stopped after 9 s"]
    assert correct.row_of_tests("x", "", 1.0).more["failed"] == ["ERROR pytest said nothing"]
    assert "| tests/kernels |" in table_of([row])


def test_tests_run_with_few_examples_in_a_process_of_their_own() -> None:
    (row,), notes = rehearsed(correct.TESTS)
    assert not notes
    assert row.more["failed"] == []
    assert row.more["counts"]["passed"] > 0
    stopped = correct.run_tests("tests/kernels/test_launch.py", 0.5, True, 1)
    assert "stopped" in stopped.more["failed"][-1]
