"""`embedgrad study`: every study runs, studies share their runs, and the paragraphs agree with the data."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embedgrad.cli.commands import study as study_command
from embedgrad.cli.commands.shared import open_configured
from embedgrad.cli.commands.study import Chosen, run
from embedgrad.compare import runner as runner_module
from embedgrad.compare.studies import NAMES, curves, drift, find_study, similarity
from embedgrad.compare.studies.study import own
from embedgrad.evaluation.statistics import in_percent
from embedgrad.train.plan import plan
from embedgrad.train.settings import load_run_config
from embedgrad.util.errors import ConfigError
from tests.compare.test_compare import configure


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All studies on a tiny model: the data and the paragraph of each."""
    folder = tmp_path_factory.mktemp("studies")
    config = configure(folder, compare__seeds=[3], optimize__validate_every=1)
    assert run("all", config, [], None, None) == 0
    written = folder / "runs/small-studies"
    for name in NAMES:
        assert (written / f"{name}.svg").read_text().startswith("<?xml")
    found = {name: json.loads((written / f"{name}.json").read_text()) for name in NAMES}
    words = {name: (written / f"{name}.md").read_text() for name in NAMES}
    return {"config": config, "data": found, "words": words, "runs": folder / "runs/small-compare"}


def test_similarity_is_what_the_records_say(studied: dict[str, Any]) -> None:
    data = studied["data"]["similarity"]
    records = runner_module.read_metrics(studied["runs"] / "optimised/seed-3")[0]
    assert data["least"] == [record["similarity_min"] for record in records if record["kind"] == "step"]
    assert f"lowest of any token was {min(data['least']):.4f}" in studied["words"]["similarity"]
    assert data["tau"] == 0.9


def test_drift_happens_without_a_region_only(studied: dict[str, Any]) -> None:
    data = studied["data"]["drift"]
    assert min(data["held"]["least"]) >= drift.TAU
    assert min(data["free"]["least"]) < drift.SIGN
    assert "similarity" in data["free"]["alarms"]
    assert "similarity" not in data["held"]["alarms"]
    assert "the similarity alarm went off" in studied["words"]["drift"]


def test_the_sweep_and_the_starts_are_complete(studied: dict[str, Any]) -> None:
    points = studied["data"]["tau"]["points"]
    assert [point["tau"] for point in points] == ["0.9", "0.5", "none"]
    for point in points[:-1]:
        assert point["similarity"] >= float(point["tau"])


def test_every_start_has_every_arm_at_equal_budgets(studied: dict[str, Any]) -> None:
    starts = studied["data"]["prompt-quality"]["starts"]
    assert set(starts) == {"good", "vague", "wrong", "other task", "adversarial", "random tokens"}
    ways = {"before", "cone 0.95", "cone 0.8", "no region", "gcg", "pez"}
    for found in starts.values():
        assert set(found) == ways
        assert found["cone 0.95"]["similarity"] >= 0.95
        assert found["cone 0.8"]["similarity"] >= 0.8
        assert found["cone 0.95"]["over_held"] == {"value": 0, "low": 0, "high": 0}
        (budget,) = found["cone 0.95"]["tokens"]
        for search in ("gcg", "pez"):
            (spent,) = found[search]["tokens"]
            assert 0.6 * budget < spent <= budget
            assert found[search]["steps"][0] >= 1
    words = studied["words"]["prompt-quality"]
    assert "At the same number of tokens gcg ends above the cone from" in words


def test_runs_are_shared_and_not_repeated(studied: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(runner_module, "evaluate", lambda *arguments: calls.append(arguments))
    before = {path: os.stat(path).st_mtime_ns for path in studied["runs"].rglob("result.json")}
    assert run("all", studied["config"], [], None, studied["runs"].parent / "again") == 0
    assert not calls
    assert before == {path: os.stat(path).st_mtime_ns for path in studied["runs"].rglob("result.json")}
    for name in NAMES:
        assert json.loads((studied["runs"].parent / f"again/{name}.json").read_text()) == studied["data"][name]


def test_a_part_of_the_grid_has_the_runs_that_were_asked_for(
    studied: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = studied["runs"].parent / "part"
    assert run("prompt-quality", studied["config"], [], None, out, Chosen(("vague",), ("pez",))) == 0
    data = json.loads((out / "prompt-quality.json").read_text())
    whole = studied["data"]["prompt-quality"]["starts"]
    assert set(data["starts"]) == {"good", "vague"}
    for name, found in data["starts"].items():
        assert found == {way: whole[name][way] for way in ("before", "cone 0.95", "pez")}
    words = (out / "prompt-quality.md").read_text()
    assert "pez ends" in words
    rows = [line for line in words.splitlines() if line.startswith(("| good |", "| vague |"))]
    assert [row.split(" | ")[1] for row in rows] == ["before", "cone 0.95", "pez"] * 2
    generated = in_percent(whole["vague"]["pez"]["generated"])
    assert rows[-1].startswith(f"| vague | pez | {generated} | {in_percent(whole['vague']['pez']['accuracy'])} | ")
    assert "gcg" not in words
    assert "ithout a region these" not in words
    assert "runs to do" not in capsys.readouterr().err  # all of them are there


def test_beside_all_studies_there_is_one_seed_unless_all_are_asked_for(
    studied: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    real = study_command.run_on_grid
    monkeypatch.setattr(study_command, "run_on_grid", lambda runner, grid: asked.append(grid.seeds) or real(
        runner, replace(grid, seeds=[3])))  # fmt: skip
    for chosen in (Chosen(), Chosen(full=True)):
        out = studied["runs"].parent / "seeds"
        assert run("all", studied["config"], ["compare.seeds=[3,4]"], None, out, chosen) == 0
    assert [list(seeds) for seeds in asked] == [[3], [3, 4]]


def test_the_work_is_told_before_it_begins_and_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(tmp_path, compare__seeds=[0, 1])
    assert run("prompt-quality", config, [], None, None, Chosen(("vague",), ("gcg",))) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "start, " in line or "runs to do" in line]
    assert told[0].startswith("prompt-quality: 10 of 10 runs to do, about ")
    order = [line.split(": ")[0].split(" ", 1)[1] for line in told[1:]]
    ways = ((0, "before"), (0, "cone 0.95"), (0, "gcg"), (1, "cone 0.95"), (1, "gcg"))
    assert order == [f"{start} start, {way}, seed {seed}" for seed, way in ways for start in ("good", "vague")]
    assert told[-1].endswith("about 0 min left")


def test_the_same_prompt_is_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(load_run_config(configure(tmp_path)))
    runner = runner_module.Runner(planned, open_configured(planned.config), tmp_path / "arms")
    calls: list[Any] = []
    real = runner_module.evaluate
    monkeypatch.setattr(runner_module, "evaluate", lambda *arguments: calls.append(1) or real(*arguments))
    items, prompt = runner.parts(0).test, own(runner)
    first = runner.evaluate(prompt, items)
    assert runner.evaluate(prompt.replace(embeddings=prompt.embeddings.clone()), list(items)) == first
    assert len(calls) == 1
    runner.evaluate(prompt, items[1:])
    runner.evaluate(prompt.replace(embeddings=prompt.embeddings + 1e-3), items)
    assert len(calls) == 3


def test_what_is_not_in_the_grid_is_refused(studied: dict[str, Any]) -> None:
    for chosen, told in (
        (Chosen(starts=("bad",)), "no start 'bad'; choose among good, vague"),
        (Chosen(arms=("cone",)), "no arm 'cone'; choose among cone 0.95, cone 0.8, no region, gcg, pez"),
    ):
        with pytest.raises(ConfigError, match=told):
            run("prompt-quality", studied["config"], [], None, None, chosen)
    with pytest.raises(ConfigError, match="choose the runs of the study prompt-quality; no other has them"):
        run("drift", studied["config"], [], None, None, Chosen(full=True))


def test_words_contradict_the_paper_where_figures_do() -> None:
    data = {
        "tau": 0.5, "least": [0.9, 0.8], "mean": [0.95, 0.9], "on_boundary": [0, 0.25], "last": [0.8, 1.0],
        "best_step": 2, "best_least": 0.8,
    }  # fmt: skip
    told = similarity._paragraph(data, 2)
    assert "is not kept" in told
    assert "25% of the tokens lie on the cone of τ = 0.5, so the region binds" in told
    shares = {"value": 0.5, "low": 0.4, "high": 0.6, "correct": 50, "total": 100}
    curve = {
        "validation_accuracy": [0.5, 0.7], "step": [1, 2], "epochs": 1, "train_loss": [2.0, 0.1],
        "validation_loss": [2.0, 1.9], "gap": [None, 0.3], "gap_low": [None, 0.1], "alarms": [{"sign": "gap"}],
        "measure": "choice_accuracy", "test_before": shares, "test_after": shares,
    }  # fmt: skip
    assert "ended 30.0 points above validation accuracy. The gap alarm went off" in curves._paragraph(curve)


def test_an_unknown_study_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no study 'taus'; choose one of similarity, curves"):
        find_study("taus")
