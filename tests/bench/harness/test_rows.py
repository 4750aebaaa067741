"""Rows: quantiles, files, which run counts; and the numbers and tables made from them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import __main__ as command
from bench.harness import markdown, report, rows, verify
from bench.harness.contenders import Case
from bench.harness.rows import Machine, Row, Run, quantile


def run(started: str, quick: bool = False) -> Run:
    machine = Machine(cpu="c", instruction_set="plain", cores=2, memory_bytes=1 << 34, gpu=None, system="s")
    return Run(started=started, command="python -m bench x", commit="0", quick=quick, versions={}, machine=machine)


def one(value: float, of: Run | None = None) -> Row:
    return rows.row("x", "us", "1", [value], case={"shape": "a"}).model_copy(update={"run": of})


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9), st.floats(0, 1))
def test_a_quantile_lies_among_the_values(values: list[float], share: float) -> None:
    found = quantile(values, share)
    assert min(values) <= found <= max(values)
    assert quantile(values, 0) == min(values)
    assert quantile(values, 1) == max(values)
    assert quantile([1, 2, 3, 4, 5], 0.5) == 3
    assert quantile([1, 2], 0.25) == 1.25


def test_rows_are_appended_and_the_last_whole_run_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert rows.newest("x", tmp_path) == []
    rows.append([one(9, run("a", quick=True))])
    assert [r.median for r in rows.newest("x", tmp_path)] == [9]
    rows.append([one(1, run("b")), one(2, run("b"))])
    rows.append([one(3, run("c")), one(4, run("c"))])
    rows.append([one(5, run("d", quick=True))])
    assert [r.median for r in rows.newest("x", tmp_path)] == [3, 4]
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 6


def test_each_model_file_has_the_rows_of_the_last_run_that_measured_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_file(value: float, model: str, started: str) -> Row:
        case = {"model": model, "types": "Q4_1"}
        return rows.row("x", "us", "1", [value], case=case).model_copy(update={"run": run(started)})

    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    rows.append([one(0, run("before rows named files"))])
    rows.append([of_file(1, "m", "a"), of_file(2, "n", "a")])
    rows.append([of_file(3, "n", "b"), of_file(4, "n", "b")])
    found = rows.newest("x", tmp_path)
    assert [r.median for r in found] == [3, 4, 1]
    assert report._source(found).count("python -m bench x") == 2


def test_json_and_unrecorded_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    out = tmp_path / "rows.json"
    assert command.main(["memory", "--quick", "--unchecked", "--json", str(out)]) == 0
    found = [Row.model_validate(r) for r in json.loads(out.read_text())]
    assert found[0].unit == "bytes"
    assert found[0].run is not None
    assert "memory --quick" in found[0].run.command
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_place_in_a_document_is_filled_and_others_are_left() -> None:
    text = "a\n<!-- bench: t -->\nold\n<!-- end of t -->\nb\n<!-- bench: u -->\nkept\n<!-- end of u -->\n"
    found = report.filled(text, {"t": "| new |"})
    assert found == text.replace("old", "| new |")
    assert report.filled(found, {"t": "| new |"}) == found


def test_numbers_for_people() -> None:
    assert markdown.human(1_234_567, "B") == "1.23 MB"
    assert markdown.seconds(0.0123) == "12.3 ms"
    assert markdown.table(("a", "b"), [(1, None)]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 |  |"]


def test_the_ideal_speed_up_counts_tokens() -> None:
    case = Case.parse("64/64/8")
    assert case.tokens == 8 * 130
    assert case.ideal == pytest.approx(8 * 130 / (64 + 8 * 66))


def test_red_tests_give_no_figure(tmp_path: Path) -> None:
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text("def test_wrong():\n    assert False\n")
    with pytest.raises(SystemExit, match="no figure"):
        verify.verify([str(wrong)])
