"""The search, in the interpreter with a stand-in clock and a stand-in compiler."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from embedgrad.kernels import launch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.tune import search as module
from bench.tune.candidates import Options, Question
from bench.tune.search import LAST_REPEATS, Broken, Found, Stopped, search
from embedgrad.backends.launch_check.case import Case
from embedgrad.backends.launch_check.compiled import Compiled
from tests.bench.tune.stand_in import CPU, Clock, Compiler, swiglu


def by_block(case: Case, options: Options) -> float:
    """The best block is 128."""
    return 1e-6 * (1 + abs(math.log2(options["BLOCK"] / 128)))


def found(question: Question, clock: Clock | None = None, compiler: Compiler | None = None, **how: Any) -> Found | None:
    lines: list[str] = how.pop("lines", [])
    with launch.pretending("sm_90"):
        return search(
            question, CPU, clock or Clock(by_block), seconds=how.pop("seconds", 600.0),
            compiler=compiler or Compiler(), told=lines.append, **how,
        )  # fmt: skip


def test_the_fastest_wins() -> None:
    lines: list[str] = []
    best = found(swiglu(32, 64, 128, 256, 512), lines=lines)
    assert best is not None
    assert best.options == {"BLOCK": 128, "num_warps": 4, "num_stages": 2}
    assert best.finished
    assert best.gained == pytest.approx(0.75)
    assert set(best.seconds) == {"3 x 70 float16", "3 x 130 float16"}
    assert list(best.before.values()) == pytest.approx([4e-6, 4e-6])
    assert len(best.measured) == 6
    assert lines == []


@settings(deadline=None, max_examples=8)
@given(st.dictionaries(st.sampled_from([16, 32, 64, 128, 256, 512, 2048]), st.floats(0.2, 3.0), min_size=1))
def test_the_winner_is_the_fastest_by_the_geometric_mean(cost: dict[int, float]) -> None:
    def seconds(case: Case, options: Options) -> float:
        factor = cost.get(options["BLOCK"], 1.0)
        return 1e-5 * (factor**1.5 if "130" in case.text else factor**0.5)

    best = found(swiglu(*cost), Clock(seconds))
    assert best is not None
    fastest = min(cost.values())
    if fastest > 1 - module.MARGIN:
        assert best.options is not None
        assert best.options["BLOCK"] == 1024
        assert best.gained == 0.0
    else:
        assert best.options is not None
        assert cost[best.options["BLOCK"]] == fastest


def test_a_gain_within_the_noise_changes_nothing() -> None:
    best = found(swiglu(64, 128), Clock(lambda case, options: 1.0 if options["BLOCK"] == 1024 else 0.99))
    assert best is not None
    assert best.options is not None
    assert best.options["BLOCK"] == 1024


def test_what_spills_or_does_not_compile_is_dropped_with_a_line() -> None:
    def says(options: Options) -> Compiled | None:
        faults = {32: Compiled("RuntimeError: ptxas fatal"), 128: Compiled(spills=20), 64: None}
        return faults.get(options["BLOCK"], Compiled())

    lines: list[str] = []
    best = found(swiglu(32, 64, 128, 256), compiler=Compiler(says), lines=lines)
    assert best is not None
    assert best.options is not None
    assert best.options["BLOCK"] == 256
    assert lines == [
        "  dropped BLOCK 32 num_warps 4 num_stages 2: RuntimeError: ptxas fatal",
        "  dropped BLOCK 64 num_warps 4 num_stages 2: not compiled in time",
        "  dropped BLOCK 128 num_warps 4 num_stages 2: 20 registers spill",
    ]


def test_spills_can_be_allowed() -> None:
    compiler = Compiler(lambda options: Compiled(spills={64: 5, 128: 4}.get(options["BLOCK"], 0)))
    best = found(swiglu(64, 128, 256), Clock(lambda case, options: options["BLOCK"]), compiler, spills=4)
    assert best is not None
    assert best.options is not None
    assert best.options["BLOCK"] == 128


def test_every_call_is_compiled_with_its_stages_and_with_one() -> None:
    compiler = Compiler()
    found(swiglu(64), compiler=compiler)
    assert [(one["BLOCK"], one["num_stages"]) for one in compiler.calls] == [
        (1024, 1), (1024, 1), (64, 1), (64, 2), (64, 1), (64, 2),
    ]  # fmt: skip


def test_a_spill_with_one_stage_drops_nothing() -> None:
    def says(options: Options) -> Compiled:
        return Compiled(spills=8 * (options["num_stages"] == 1))

    best = found(swiglu(128), compiler=Compiler(says))
    assert best is not None
    assert best.options is not None
    assert best.options["BLOCK"] == 128


def test_what_misses_the_reference_is_dropped_with_a_line() -> None:
    """With two stages the fastest candidate leaves its output unwritten."""
    lines: list[str] = []
    with launch.recorded(lambda one: not (one[3]["num_stages"] == 2 and one[3]["BLOCK"] == 128)):
        best = found(swiglu(64, 128), lines=lines)
    assert best is not None
    assert best.options is not None
    assert best.options["BLOCK"] == 64
    (line,) = lines
    assert line.startswith("  dropped BLOCK 128 num_warps 4 num_stages 2: with 2 stages out has 210 of 210 elements")
    assert line.endswith("(3 x 70 float16)")


def test_wrong_parameters_in_use_lose_even_where_they_are_faster() -> None:
    lines: list[str] = []
    with launch.recorded(lambda one: one[3]["BLOCK"] != 1024):
        best = found(swiglu(64, 128), Clock(lambda case, options: 1.0 / options["BLOCK"]), lines=lines)
    assert best is not None
    assert best.options is not None
    assert best.options["BLOCK"] == 128
    assert "only others can win" in lines[0]
    with launch.recorded(lambda one: False):
        assert found(swiglu(64, 128)) is None


def test_the_slower_half_is_not_timed_to_the_end() -> None:
    clock = Clock(by_block)
    found(swiglu(16, 32, 64, 128, 256, 512, 2048, 4096), clock)
    times = {block: sum(one["BLOCK"] == block for _, one in clock.readings) for block in (4096, 16, 128, 1024)}
    assert times[4096] == times[16] == 2 * 3
    assert times[128] == times[1024] == 2 * (3 + 6 + 12 + 24 + LAST_REPEATS)


def test_the_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the search goes on by a second with every reading of the stand-in."""
    clock = Clock(by_block)
    monkeypatch.setattr(module.time, "monotonic", lambda: float(clock.read))
    best = found(swiglu(16, 32, 64, 128, 256, 512), clock, seconds=20.0)
    assert best is not None
    assert not best.finished
    assert best.options is not None
    assert best.options["BLOCK"] == 128
    assert clock.read == 28  # two turns of seven on two shapes; the third would begin after the 20 s


def test_no_time_to_check_drops_all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    best = found(swiglu(64, 128), seconds=-1.0, lines=lines)
    assert best is not None
    assert best.options is not None
    assert best.options["BLOCK"] == 1024
    assert not best.finished
    assert all(line.endswith("not checked in time") for line in lines)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_ctrl_c_leaves_what_was_found() -> None:
    with pytest.raises(Stopped) as stopped:
        found(swiglu(64, 128), Clock(by_block, {50: interrupt}))
    best = stopped.value.found
    assert best is not None
    assert not best.finished
    assert best.options is not None
    assert best.options["BLOCK"] == 128


def test_ctrl_c_before_the_first_round_leaves_nothing() -> None:
    with pytest.raises(Stopped) as stopped:
        found(swiglu(64, 128), Clock(by_block, {2: interrupt}))
    assert stopped.value.found is None


def lose() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")


def test_a_candidate_that_breaks_the_device_is_named() -> None:
    with pytest.raises(Broken, match="illegal memory access") as broken:
        found(swiglu(64, 128), Clock(by_block, {5: lose}))
    assert broken.value.candidate == "BLOCK 64 num_warps 4 num_stages 2"
    question = swiglu(64, 128)

    def run(given: Any, out: Any) -> None:
        if launch.options("swiglu", "sm_90", dtype=question.cases[0].dtype, width=70)["BLOCK"] == 128:
            lose()
        question.cases[0].run(given, out)

    with pytest.raises(Broken) as broken:
        found(replace(question, cases=(replace(question.cases[0], run=run),)))
    assert broken.value.candidate == "BLOCK 128 num_warps 4 num_stages 2"
    best = found(question, without=[broken.value.candidate])
    assert best is not None
    assert best.options is not None
    assert best.options["BLOCK"] == 64


def test_what_cannot_be_timed_is_dropped() -> None:
    class Picky(Clock):
        def timer(self, case: Case, options: Options, call: Any) -> Any:
            if options["BLOCK"] == 128:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().timer(case, options, call)

    lines: list[str] = []
    best = found(swiglu(64, 128), Picky(by_block), lines=lines)
    assert best is not None
    assert best.options is not None
    assert best.options["BLOCK"] == 64
    assert "it cannot be timed: RuntimeError: operation not permitted" in lines[0]


def test_parameters_in_use_that_cannot_be_run_here_are_replaced() -> None:
    question, lines = swiglu(32, 64, 128), []

    def run(given: Any, out: Any) -> None:
        if launch.options("swiglu", "sm_90", dtype=question.cases[0].dtype, width=70)["BLOCK"] == 1024:
            raise RuntimeError("out of resource: shared memory")
        question.cases[0].run(given, out)

    best = found(replace(question, cases=(replace(question.cases[0], run=run),)), lines=lines)
    assert best is not None
    assert best.options is not None
    assert best.options["BLOCK"] == 128
    assert best.before == {}
    assert "out of resource" in lines[0]
