"""The tuner as a whole: rows are found, written, merged with others and read again; and what stops it loses nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from embedgrad.kernels import launch, launch_table, tuned_rows

from bench import __main__ as bench_command
from bench.tune import command, search
from bench.tune.candidates import Options, Question, questions
from bench.tune.command import Tuning
from embedgrad.backends.launch_check.case import Case
from embedgrad.util.errors import EmbedGradError
from tests.bench.tune.stand_in import CPU, Clock, Compiler, swiglu

ASKED = [swiglu(64, 128), swiglu(256, 512, kernel="swiglu_backward")]


def smaller_is_faster(case: Case, options: Options) -> float:
    return 1e-6 * options["BLOCK"]


def tuned(path: Path, asked: list[Question], clock: Clock | None = None, seconds: float = 600.0) -> Tuning:
    lines: list[str] = []
    tuning = Tuning(
        CPU, path, clock or Clock(smaller_is_faster), Compiler(), told=lines.append, json=path.with_suffix(".jsonl")
    )
    tuning.lines = lines  # type: ignore[attr-defined]
    with launch.pretending("sm_90"):
        tuning.run(asked, seconds)
    return tuning


def test_the_rows_are_written_with_where_they_come_from_and_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    tuned(path, ASKED)
    rows = tuned_rows.read(path)
    assert [(row.kernel, row.arch, row.options["BLOCK"], row.bytes) for row in rows] == [
        ("swiglu", "sm_90", 64, (2,)), ("swiglu_backward", "sm_90", 256, (2,)),
    ]  # fmt: skip
    for row in rows:
        assert row.tuned is not None
        assert row.tuned.triton == triton.__version__
        assert row.tuned.device == "no GPU"
        assert row.tuned.date.endswith(" UTC")
        assert row.tuned.before == {"3 x 70 float16": 1024.0, "3 x 130 float16": 1024.0}
        assert f"Triton {triton.__version__}" in row.reason
    monkeypatch.setattr(launch, "ROWS", rows + launch_table.WRITTEN)
    launch._looked_up.cache_clear()
    try:
        assert launch.options("swiglu", "sm_90", dtype=torch.bfloat16, width=8960)["BLOCK"] == 64
        assert launch.options("swiglu", "sm_80", dtype=torch.bfloat16, width=8960)["BLOCK"] == 1024
    finally:
        launch._looked_up.cache_clear()
    measured = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert [len(one["seconds"]) for one in measured] == [3, 3]


def test_a_second_run_replaces_its_rows_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    tuned(path, ASKED)
    before = path.read_text()
    tuned(path, ASKED[:1], Clock(lambda case, options: 1e-6 / options["BLOCK"] * (1 + (options["BLOCK"] == 1024))))
    rows = {row.kernel: row.options["BLOCK"] for row in tuned_rows.read(path)}
    assert rows == {"swiglu": 1024, "swiglu_backward": 256}
    patch = command.change(before, path.read_text(), path).splitlines()
    assert patch[:2] == ["--- a/rows.json", "+++ b/rows.json"]
    assert [line[:25] for line in patch if line[0] in "+-" and line[1:2] == "{"] == [
        '-{"kernel": "swiglu", "ar', '+{"kernel": "swiglu", "ar',
    ]  # fmt: skip


def test_ctrl_c_keeps_the_rows_found_before_and_the_one_at_hand(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    path, counted = tmp_path / "rows.json", Clock(smaller_is_faster)
    tuned(path, ASKED[:1], counted)
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        tuned(path, ASKED, Clock(smaller_is_faster, {counted.read + 30: interrupt}))
    assert [row.kernel for row in tuned_rows.read(path)] == ["swiglu", "swiglu_backward"]
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        tuned(path, ASKED, Clock(smaller_is_faster, {counted.read + 2: interrupt}))
    assert [row.kernel for row in tuned_rows.read(path)] == ["swiglu"]


def test_the_time_is_shared_and_what_it_does_not_suffice_for_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(smaller_is_faster)
    monkeypatch.setattr(search.time, "monotonic", lambda: float(clock.read))  # one module: the command's, too
    tuning = tuned(tmp_path / "rows.json", [*ASKED, *ASKED], clock, 40.0)
    lines = tuning.lines  # type: ignore[attr-defined]
    assert lines[0] == "swiglu: 2 candidates, 10 s"
    assert clock.read <= 40 + 6
    assert lines[-1].startswith("the time is over: not tuned swiglu") or len(tuning.found) == 4


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.json"
    path.write_text('{"mine": 1}')
    with pytest.raises(EmbedGradError, match=r"notes\.json is no file of tuned rows"):
        command.read(path)
    assert bench_command.main(["tune", "--into", str(path)]) == 2
    assert path.read_text() == '{"mine": 1}'
    assert capsys.readouterr().err.count("\n") == 1


def test_without_a_gpu_it_says_so_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    path = tmp_path / "rows.json"
    assert bench_command.main(["tune", "--device", "cuda", "--minutes", "1", "--into", str(path)]) == 2
    assert "torch finds no GPU, so there is nothing to tune on" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--minutes", "soon"], ["--kernel", "nonsense"]])
def test_options_that_make_no_sense_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        bench_command.main(["tune", *words])
    assert refused.value.code == 2
    assert words[1] in capsys.readouterr().err


def test_after_a_lost_device_a_new_process_goes_on_without_the_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(command.os, "execv", lambda program, words: started.append(words) or sys.exit(0))
    _, args = bench_command.parse(["tune", "--kernel", "rope", "swiglu", "--without", "BLOCK_H 4", "--first", "1"])
    with pytest.raises(SystemExit):
        command.go_on(args, search.Broken("BLOCK 64 num_warps 4", "illegal"), 2, 3.25)
    _, again = bench_command.parse(started[0][3:])
    assert started[0][:3] == [sys.executable, "-m", "bench"]
    assert (again.kernel, again.first, again.minutes) == (["rope", "swiglu"], 3, 3.25)
    assert again.without == ["BLOCK_H 4", "BLOCK 64 num_warps 4"]
    with pytest.raises(SystemExit):
        command.go_on(args, search.Broken("in use: BLOCK 1", "illegal"), 2, 3.25)
    _, again = bench_command.parse(started[1][3:])
    assert (again.first, again.without) == (4, ["BLOCK_H 4"])
    assert command.go_on(args, search.Broken("BLOCK 64", "illegal"), 2, 0.1) == 1


def on_a_stand_in(monkeypatch: pytest.MonkeyPatch, clock: Clock, *words: str) -> int:
    """The whole command, its own compiler included, where only the GPU, its clock and the questions are stand-ins."""
    monkeypatch.setattr(command, "device_of", lambda name: CPU)
    monkeypatch.setattr(command.torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(command, "CudaClock", lambda device: clock)
    monkeypatch.setattr(command, "questions", lambda: ASKED)
    with launch.pretending("sm_90"):
        return bench_command.main(["tune", "--kernel", "swiglu", "swiglu_backward", *words])


def test_the_command_writes_rows_and_prints_the_change_as_a_patch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    assert on_a_stand_in(monkeypatch, Clock(smaller_is_faster), "--into", str(path)) == 0
    assert [row.kernel for row in tuned_rows.read(path)] == ["swiglu", "swiglu_backward"]
    out = capsys.readouterr().out
    assert '+{"kernel": "swiglu_backward", "arch": "sm_90"' in out
    assert "swiglu: 2 candidates" in out
    assert "93.8% less time" in out


def test_ctrl_c_ends_the_command_with_130_and_the_rows_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    path, counted = tmp_path / "rows.json", Clock(smaller_is_faster)
    tuned(path, ASKED[:1], counted)
    path.unlink()
    clock = Clock(smaller_is_faster, {counted.read + 1: interrupt})
    assert on_a_stand_in(monkeypatch, clock, "--into", str(path)) == 130
    assert [row.kernel for row in tuned_rows.read(path)] == ["swiglu"]


def test_a_lost_device_keeps_the_rows_found_and_goes_on_with_the_kernel_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    started: list[Any] = []
    monkeypatch.setattr(command.os, "execv", lambda program, words: started.append(words) or sys.exit(7))
    path, counted = tmp_path / "rows.json", Clock(smaller_is_faster)
    tuned(path, ASKED[:1], counted)
    path.unlink()
    with pytest.raises(SystemExit):
        on_a_stand_in(monkeypatch, Clock(smaller_is_faster, {counted.read + 2: lose}), "--into", str(path))
    assert [row.kernel for row in tuned_rows.read(path)] == ["swiglu"]
    _, again = bench_command.parse(started[0][3:])
    assert (again.first, again.without, again.into) == (1, ["BLOCK 256 num_warps 4 num_stages 2"], path)


def test_every_kernel_of_the_table_has_a_question_and_every_row_found_would_be_used() -> None:
    from embedgrad.backends.launch_check.table import KERNELS

    asked = questions()
    assert {one.kernel for one in asked} == KERNELS.keys()
    keys = set()
    for one in asked:
        row = command.Row(
            one.kernel, "sm_90", {}, "", bytes=one.bytes, at_most=one.at_most, at_least=one.at_least,
        )  # fmt: skip
        assert tuned_rows.key(row) not in keys, f"two questions have one row: {one.name}"
        keys.add(tuned_rows.key(row))
        for case in one.cases:
            assert row.fits(one.kernel, "sm_90", case.dtype, case.sizes), f"{one.name} does not hold for {case.text}"
            with launch.pretending("sm_90"):
                in_use = case.options(CPU)
            assert all(candidate.keys() <= in_use.keys() for candidate in one.candidates), one.name
        assert len({tuple(sorted(candidate.items())) for candidate in one.candidates}) == len(one.candidates), one.name
        assert len({case.text for case in one.cases}) == len(one.cases)
