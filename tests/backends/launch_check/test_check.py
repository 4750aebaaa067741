"""The check of launch rows, in the interpreter on tiny shapes: right rows pass, planted wrong ones are named."""

from __future__ import annotations

import ast
import itertools
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from embedgrad.kernels import launch
from embedgrad.kernels.launch_row import Row
from embedgrad.kernels.launch_table import ROWS, WRITTEN, heuristic
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.backends.launch_check import attention, check, compiled, products, rowwise, table
from embedgrad.backends.launch_check.case import Case, poisoned

ROOT = Path(__file__).parents[3]
CPU, HALF = torch.device("cpu"), torch.float16  # the interpreter's products of bfloat16 are wrong
ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942", "sm_86")
SWIGLU = Row("swiglu", "sm_90", {"BLOCK": 64, "num_warps": 4, "num_stages": 3}, "planted")


def quiet(_: str) -> None:
    pass


def checked(case: Case, **options: int) -> check.Verdict:
    one = check.Checked(case, CPU)
    return one.verdict({**case.options(CPU), **options})


def test_every_kernel_that_asks_the_launch_table_has_cases() -> None:
    """Of all words in the kernels' sources, those that the launch table's heuristic knows."""

    def known(word: str) -> bool:
        try:
            return bool(heuristic(word, "sm_90", 2, {"width": 64, "head_dim": 64, "rows": 1}))
        except KeyError:
            return False

    trees = [ast.parse(path.read_text()) for path in (ROOT / "kernels").glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    words = {node.value for node in nodes if isinstance(node.value, str)}
    assert {word for word in words if known(word)} == table.KERNELS.keys()


@pytest.mark.parametrize("arch", ARCHES)
def test_every_row_that_is_shipped_has_cases(arch: str) -> None:
    found = table.subjects(arch)
    assert {subject.kernel for subject in found} == table.KERNELS.keys()
    with launch.pretending(arch):
        for subject, case in ((s, c) for s in found for c in s.cases):
            with launch.observed() as used:
                options = case.options(CPU)
            assert used[-1] == (subject.kernel, subject.row), subject.name
            assert options["num_stages"] >= 1
    reached = {id(subject.row) for subject in found}
    mine = [row for row in WRITTEN if row.arch in (arch, "sm_*" if arch.startswith("sm_") else arch)]
    tuned = {row.kernel for row in ROWS if row.tuned is not None and row.arch == arch}
    hidden = [row for row in mine if id(row) not in reached and not any(fnmatchcase(k, row.kernel) for k in tuned)]
    assert all(row.arch == "sm_*" for row in hidden), hidden


def test_rows_of_every_kernel_are_right_in_the_interpreter() -> None:
    """One architecture has all kernels; head dimensions of 128 and less keep it quick."""
    with launch.pretending("sm_90"):
        found = [s for s in table.subjects("sm_90", half=HALF, scale=table.TINY) if "256" not in s.name]
        outcomes = table.check(found, CPU, told=quiet)
    assert len({o.subject.kernel for o in outcomes}) == len(table.KERNELS)
    assert [(o.subject.name, o.why, o.verdict) for o in outcomes if o.verdict is None or not o.verdict.right] == []


SMALL = [
    rowwise.rms_norm(3, 70, HALF), rowwise.rms_norm(3, 70, HALF, True), rowwise.rope(3, (4, 2, 16), HALF, normed=True),
    rowwise.rope(3, (4, 2, 16), HALF, True, True), rowwise.swiglu(3, 70, HALF), rowwise.swiglu(3, 70, HALF, True),
    rowwise.embed(6, 3, 70, HALF), rowwise.embed(6, 3, 70, HALF, True), rowwise.prompt_step(3, 70),
    *(attention.tree_attention(name, (9, 7, 3), (4, 2, 16), HALF, extras=2)
      for name in (attention.FORWARD, attention.DQ, attention.DKV)),
    attention.decode_attention(3, 17, 9, (4, 2, 16), HALF), products.softmax_loss(3, 700, torch.float32),
    products.dequantize(20, 128, HALF), products.quantized_linear(5, 40, 128, HALF),
    products.quantized_linear(5, 40, 128, HALF, "int8", backward=True),
    products.quantized_linear(5, 40, 128, HALF, reduce=True),
]  # fmt: skip


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.kernel} {case.text}")
def test_a_kernel_that_leaves_a_part_out_is_wrong(case: Case) -> None:
    """Its outputs start poisoned, or as copies that the operation must change."""
    assert checked(case).right

    def skip(given: dict[str, Any], out: dict[str, Any]) -> None:
        pass

    verdict = checked(replace(case, run=skip))
    assert not verdict.right
    assert verdict.fault is not None
    assert verdict.fault.startswith("with 1 stage ")


def test_a_row_that_is_wrong_with_its_stages_is_named() -> None:
    """The planted row leaves its output unwritten where the kernel has more than one stage."""

    def leave_out(one: launch.Launch) -> bool:
        return one[3].get("num_stages") != 3

    with launch.pretending("sm_90"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "ROWS", (SWIGLU, *ROWS))
        launch._looked_up.cache_clear()
        found = [s for s in table.subjects("sm_90", (SWIGLU, *ROWS), half=HALF, scale=table.TINY) if "swiglu" in s.name]
        with launch.recorded(leave_out):
            outcomes = table.check(found, CPU, told=quiet)
    launch._looked_up.cache_clear()
    (wrong,) = (o for o in outcomes if o.subject.row is SWIGLU)
    assert not wrong.trusted
    assert wrong.verdict is not None
    assert wrong.verdict.fault == "with 3 stages out has 210 of 210 elements that are not written or NaN"
    assert "swiglu, the row for sm_90" in wrong.subject.name
    assert all(o.trusted for o in outcomes if o is not wrong)


def test_two_runs_with_different_bits_are_a_fault() -> None:
    case, count = rowwise.swiglu(3, 70, HALF), itertools.count()

    def run(given: Any, out: Any) -> None:
        case.run(given, out)
        out["out"][0, 0] += next(count) * 2.0**-8

    assert checked(replace(case, run=run)).fault == "with 1 stage two runs give out with different bits"


def test_parameters_that_cannot_be_run_are_a_fault() -> None:
    fault = checked(products.dequantize(20, 128, HALF), BLOCK_K=48).fault
    assert fault is not None
    assert fault.startswith("with 1 stage it cannot be run: ValueError: tiles of 48 columns")


@pytest.mark.parametrize("row", [0, 1, 2])
def test_one_wrong_row_of_many_is_found(row: int) -> None:
    case = rowwise.swiglu(200, 70, HALF)

    def run(given: Any, out: Any) -> None:
        case.run(given, out)
        out["out"][row * 60, 13] += 0.5

    assert not checked(replace(case, run=run)).right


def test_a_lost_device_ends_the_check_and_names_the_row() -> None:
    def run(given: Any, out: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered\nand more")

    subject, after = (s for s in table.subjects("sm_90", half=HALF, scale=table.TINY) if s.kernel == "rms_norm"), None
    first = next(subject)
    case = replace(first.cases[0], run=run)
    after = replace(first, kernel="after")
    outcomes = table.check([replace(first, cases=(case,)), after], CPU, told=quiet)
    assert not outcomes[0].trusted
    assert outcomes[0].verdict is not None
    assert "the device was lost: rms_norm" in str(outcomes[0].verdict.fault)
    assert outcomes[1].verdict is None
    assert outcomes[1].why == "not checked: the device was lost before"


def test_what_there_is_no_time_for_is_said_to_be_unchecked() -> None:
    found = table.subjects("interpreter", half=HALF, scale=table.TINY)[:2]
    outcomes = table.check(found, CPU, seconds=0.0, told=quiet)
    assert [o.verdict for o in outcomes] == [None, None]
    assert {o.why for o in outcomes} == {"not checked: 0 seconds were over"}


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**31), st.sampled_from([torch.float32, HALF, torch.bfloat16]))
def test_the_rule_allows_rounding_and_finds_one_wrong_element(size: int, seed: int, dtype: torch.dtype) -> None:
    truth = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rounded = truth.to(dtype)
    assert check.compared(rounded, rounded, truth)[0] is None
    wrong = rounded.clone()
    wrong[seed % size] += 0.5 * truth.abs().max().to(dtype)
    assert check.compared(wrong, rounded, truth)[0] is not None
    wrong[seed % size] = float("nan")
    assert "NaN" in str(check.compared(wrong, rounded, truth)[0])


def test_infinite_elements_must_be_met() -> None:
    truth = torch.tensor([1.0, float("-inf")], dtype=torch.float64)
    assert check.compared(truth.float(), truth.float(), truth)[0] is None
    assert check.compared(torch.tensor([1.0, 3.0]), truth.float(), truth)[0] is not None


class FakeKernel:
    """Stands in for a JITFunction: compiles what it is told to."""

    def __init__(self, spills: int = 0, fails: str = "") -> None:
        self.spills, self.fails, self.compiled = spills, fails, 0

    def warmup(self, *arguments: Any, grid: Any, **constants: Any) -> Any:
        self.compiled += 1
        if self.fails == "compile":
            raise RuntimeError("PassManager::run failed\nmore")
        return self

    def _init_handles(self) -> None:
        if self.fails == "load":
            raise RuntimeError("out of resource: shared memory, Required: 240000")

    @property
    def n_spills(self) -> int:
        return self.spills


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (FakeKernel(), compiled.Compiled()),
        (FakeKernel(spills=12), compiled.Compiled(spills=12)),
        (FakeKernel(fails="compile"), compiled.Compiled("RuntimeError: PassManager::run failed")),
        (FakeKernel(fails="load"), compiled.Compiled("RuntimeError: out of resource: shared memory, Required: 240000")),
    ],
)
def test_what_the_compiler_makes_is_told_and_made_once(kernel: FakeKernel, expected: compiled.Compiled) -> None:
    def run(given: Any, out: Any) -> None:
        launch.run(kernel, (1,), out["out"], 3, BLOCK=16)

    case = replace(rowwise.swiglu(3, 70, HALF), run=run, fresh=lambda a: {"out": poisoned(a["da"])})
    one = check.Checked(case, CPU)
    assert compiled.compile_all([(one, case.options(CPU))] * 3, CPU) == [expected] * 3
    assert kernel.compiled == 1


def test_a_call_that_the_launcher_refuses_is_told() -> None:
    one = check.Checked(products.dequantize(20, 128, HALF), CPU)
    (found,) = compiled.compile_all([(one, {**one.case.options(CPU), "BLOCK_K": 48})], CPU)
    assert found is not None
    assert str(found.fault).startswith("ValueError: tiles of 48 columns")
