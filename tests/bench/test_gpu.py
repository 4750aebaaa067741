"""`bench gpu` around its sections: time, failures, files that are whole, and rows that are taken from elsewhere."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import gpu
from bench.harness import report, rows
from bench.harness.rows import Machine, Row, Run
from bench.on_gpu.ceilings import SECTION
from bench.on_gpu.device import Rehearsal
from bench.on_gpu.section import Bench, Job, Section, failure, figure, tiny
from bench.on_gpu.show import short


def run(commit: str = "a", gpu: str | None = "Card") -> Run:
    machine = Machine(cpu="c", instruction_set="", cores=2, memory_bytes=None, gpu=gpu, system="s")
    return Run(started=f"2026-01-0{ord(commit[0]) - 96}", command="python -m bench gpu", commit=commit, quick=False,
               versions={"torch": "2"}, machine=machine)  # fmt: skip


def copied(rate: float, of: Run | None = None) -> Row:
    found = figure("ceilings", "torch", [rate * 1e12], {"what": "copy", "bytes": 8}, version="t", unit="bytes/s")
    return found.model_copy(update={"run": of})


def section(name: str, cost: float, *jobs: Job) -> Section:
    return Section(name, f"{name}?", cost, lambda bench: iter(jobs), SECTION.table)


def test_a_job_that_fails_is_named_and_the_next_goes_on() -> None:
    def fails() -> list[Row]:
        raise RuntimeError("no such kernel\nand more")

    jobs = (
        Job("one", fails, 0), Job("two", lambda: [copied(1)], 0),
        Job("three", lambda: [copied(2)], 0, needs=("no_such",)), Job("four", lambda: [copied(3)], 1e6),
    )  # fmt: skip
    lines = list(gpu.measured(section("s", 1, *jobs), Bench(Rehearsal(), tiny()), time.time() + 60))
    assert lines[0] == {"note": "one: RuntimeError: no such kernel"}
    assert Row.model_validate(lines[1]["row"]).median == 1e12
    assert lines[2] == {"note": "three: left out, no_such is not installed"}
    assert str(lines[3]["note"]).startswith("four: left out, its 1000000 s")


def test_a_section_that_fails_before_its_first_job_is_named() -> None:
    def jobs(bench: Bench) -> Iterator[Job]:
        raise ValueError("no model")
        yield

    lines = list(gpu.measured(Section("s", "?", 1, jobs, SECTION.table), Bench(Rehearsal(), tiny()), time.time() + 60))
    assert lines == [{"note": "s ended early: ValueError: no model"}]


def test_after_each_section_the_files_are_whole_and_no_time_is_named(tmp_path: Path) -> None:
    seen: list[int] = []

    def ask(one: Section, until: float) -> gpu.Found:
        if (tmp_path / "gpu.jsonl").exists():
            seen.append(len(rows.read(tmp_path / "gpu.jsonl")))
        return [copied(len(seen) + 1.0)], [f"{one.name} has a note"]

    sections = [section("first", 5), section("dear", 1e5), section("last", 5)]
    found = gpu.ask_sections(sections, 60, tmp_path, run(), ask)
    assert [one.median for one in found] == [1e12, 2e12]
    assert seen == [1]
    assert rows.read(tmp_path / "gpu.jsonl") == found
    page = (tmp_path / "gpu.md").read_text()
    assert "# embedgrad on Card" in page
    assert "- dear: left out, " in page
    assert "- last has a note" in page
    assert "## What does the card do at most?" in page
    assert not [path for path in tmp_path.iterdir() if path.name not in ("gpu.jsonl", "gpu.md")]


def test_what_was_printed_before_a_cut_counts() -> None:
    lines = [json.dumps({"row": copied(1).model_dump()}), "a warning", json.dumps({"note": "n"}), '{"row": {"quest']
    found, notes = gpu.read("\n".join(lines))
    assert [one.median for one in found] == [1e12]
    assert notes == ["n"]


def test_a_section_runs_in_a_process_and_is_stopped_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter")
    found, notes = gpu._ask(SECTION, time.time() + 120, True)
    assert [one.case["what"] for one in found] == ["copy", "product"]
    assert notes == []
    monkeypatch.setattr(gpu, "LEAST", 0.2)
    found, notes = gpu._ask(SECTION, time.time(), True)
    assert found == []
    assert notes == ["ceilings: stopped when its time was over"]


def test_without_a_gpu_it_says_so_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device is present here"):
        command.main(["gpu", "--unrecorded"])


def test_commits_and_cards_stand_beside_each_other() -> None:
    found = [copied(1, run("a")), copied(2, run("b")), copied(3, run("c", "Other card"))]
    text = gpu.tables(found)["gpu-ceilings"]
    places = [text.index(told) for told in ("**Card**", "| a | 1.00 |", "| b | 2.00 |", "**Other card**")]
    assert places == sorted(places)
    assert gpu.tables(found)["gpu-runs"].count("\n") == 4


def test_what_a_contender_cannot_do_is_told() -> None:
    case = {"model": "m", "weights": "bf16", "shape": "1/2/3"}
    ours = figure("step", "embedgrad", [0.0125], {**case, "policy": "all", "way": "step"}, peak_bytes=1 << 20)
    text = gpu.tables([ours, failure("step", "peft", case, "v", "out of memory")])["gpu-step"]
    assert "| out of memory |" in text
    assert "| 12.5 |" in text
    assert "– / – / 1" in text


@pytest.mark.parametrize(("name", "told"), [
    ("void at::native::vectorized_elementwise_kernel<4, x>(int, y)", "vectorized_elementwise"),
    ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
    ("a::(anonymous namespace)::sample_kernel(a::P, b)", "sample"),
    ("rms_norm_kernel", "rms_norm"),
])  # fmt: skip
def test_a_kernels_name_for_people(name: str, told: str) -> None:
    assert short(name) == told


# ---- rows of several machines ----------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_rows_of_another_device_replace_none(results: Path) -> None:
    def one(commit: str, card: str | None, device: str) -> Row:
        found = rows.row("x", "us", "1", [1.0], case={"device": device})
        return found.model_copy(update={"run": run(commit, card)})

    rows.append([one("a", None, "cpu")])
    rows.append([one("b", "Card", "cuda"), one("b", "Card", "cpu")])  # a run on a card, with a figure of its host
    rows.append([one("c", "Other", "cuda")])
    rows.append([one("d", "Other", "cpu")])  # a machine with a card, on its CPU

    def commits(card: str | None) -> list[str]:
        return [r.run.commit for r in rows.newest("x", results, card) if r.run]

    assert commits(None) == ["d"]
    assert commits("Card") == ["b", "b"]
    assert commits("Other") == ["c"]
    assert commits("Third") == []
    assert rows.cards("x", results) == ["Other", "Card"]


def test_tables_of_a_card_have_names_of_their_own(results: Path) -> None:
    class Question:
        __name__ = "bench.x"

        def tables(self, found: list[Row]) -> dict[str, str]:
            return {"x": "".join(f"| {r.median} |" for r in found)}

    for commit, value, device in (("a", 1.0, "cpu"), ("b", 2.0, "cuda")):
        found = rows.row("x", "us", "1", [value], case={"device": device})
        rows.append([found.model_copy(update={"run": run(commit)})])
    made = report.tables_of(Question())  # type: ignore[arg-type]
    assert made["x"].startswith("| 1.0 |")
    assert made["x-cuda"].startswith("| 2.0 |")
    assert "Card" in made["x-cuda"]


def test_rows_from_elsewhere_are_taken_once(results: Path, tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    path.write_text(copied(1, run("a")).model_dump_json() + "\n")
    assert rows.take(path) == [results / "gpu.jsonl"]
    assert rows.take(path) == []
    path.write_text("".join(copied(n, run("a")).model_dump_json() + "\n" for n in (1, 2)))
    rows.take(path)
    assert [one.median for one in rows.read(results / "gpu.jsonl")] == [1e12, 2e12]


def _no_row() -> str:
    return copied(1, run()).model_dump_json() + "\n" + '{"question": "gpu"}\n'


@pytest.mark.parametrize(("text", "told"), [
    (lambda: "", "holds no rows"),
    (lambda: copied(1).model_dump_json(), "do not say which run"),
    (_no_row, "line 2 of .* is no row of a benchmark: contender"),
    (lambda: "not json", "line 1 of .* is no row of a benchmark"),
    (lambda: copied(1, run()).model_dump_json().replace('"gpu"', '"../gpu"', 1), "names the question '../gpu'"),
])  # fmt: skip
def test_a_file_of_something_else_is_refused_in_one_line(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: Callable[[], str], told: str
) -> None:
    path = tmp_path / "given.jsonl"
    path.write_text(text())
    assert command.main(["report", "--take", str(path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    with pytest.raises(ValueError, match=told):
        rows.take(path)
    assert not results.exists()


@pytest.mark.parametrize(("given", "told"), [
    (["gpu", "--minutes", "0"], "'0' is no number of minutes above 0."),
    (["gpu", "--minutes", "nan"], "'nan' is no number of minutes above 0."),
    (["gpu", "--out", "README.md"], "'README.md' cannot be a folder, since 'README.md' is a file."),
    (["gpu", "--out", "README.md/a/b"], "README.md' is a file."),
    (["gpu", "--sections", "no"], "invalid choice: 'no'"),
    (["host", "--shapes", "64/64"], "'64/64' is no prompt/query/batch"),
    (["step", "--shapes", "0/64/8"], "'0/64/8' is no prompt/query/batch"),
    (["host", "--repeats", "0"], "'0' is no whole number above 0."),
    (["host", "--policies", "none"], "invalid choice: 'none'"),
])  # fmt: skip
def test_an_option_that_is_wrong_is_told_in_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: list[str], told: str
) -> None:
    monkeypatch.chdir(rows.ROOT)
    with pytest.raises(SystemExit) as ended:
        command.main(given)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_folder_is_no_file_of_rows(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["report", "--take", str(tmp_path)]) == 2
    assert "cannot be read as text" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["report", "--take", str(tmp_path / "no.jsonl")]) == 2
    assert "no.jsonl" in capsys.readouterr().err
