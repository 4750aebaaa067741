"""`embedgrad compare` from the configuration to the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedgrad.cli.commands.compare import run
from embedgrad.compare import runner as runner_module
from embedgrad.compare.outcome import Outcome
from embedgrad.compare.table import lines
from embedgrad.evaluation.statistics import mcnemar_p, wilson
from embedgrad.util.errors import ConfigError, EmbedGradError
from tests.train.training import model_folder

WORDS = ["joy", "pain", "wit", "noise"]


def configure(folder: Path, **changes: Any) -> Path:
    """A configuration of a comparison on a tiny model that takes seconds."""
    rows = [{"text": f"A film of {WORDS[i % 4]}, number {i}", "label": ["good", "bad"][i % 2]} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "model": {"path": str(model_folder()), "device": "cpu"},
        "prompt": "Say what it is.",
        "data": {
            "path": str(folder / "data.jsonl"), "query": "text", "target": "label", "labels": ["good", "bad"],
            "split": {"train": 12, "validation": 4, "test": 10},
        },
        "optimize": {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "trust_region": {"tau": 0.9}},
        "compare": {"seeds": [0, 1], "taus": [0.9, 0.5], "shots": 2, "paraphrases": ["What is it?", "Good or bad?"]},
        "run": {"folder": str(folder / "runs")},
    }  # fmt: skip
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    return folder / "small.yaml"


def compare(config: Path) -> dict[str, Any]:
    """Runs the command. Returns the contents of compare.json."""
    assert run(config, [], None, True, False) == 0
    folder = config.parent / "runs" / f"{config.stem}-compare"
    found = json.loads((folder / "compare.json").read_text())
    assert isinstance(found, dict)
    return found


def test_every_arm_stands_in_the_table(tmp_path: Path) -> None:
    config = configure(tmp_path)
    found = compare(config)
    by_arm = {line["arm"]: line for line in found["lines"]}
    assert list(by_arm) == [
        "original", "optimised", "no-prompt", "user-turn-before", "user-turn-after", "format-only", "unconstrained",
        "tau-0.5", "few-shot", "paraphrases", "peft",
    ]  # fmt: skip
    assert {name for name, line in by_arm.items() if line["seeds"] == 2} == {
        "optimised",
        "format-only",
        "unconstrained",
    }
    outcomes = [Outcome(**values) for values in found["outcomes"]]
    assert len({tuple(outcome.items) for outcome in outcomes}) == 1
    assert len(outcomes[0].items) == 10
    original = next(outcome for outcome in outcomes if outcome.arm == "original")
    tuned = [outcome for outcome in outcomes if outcome.arm == "optimised"]
    for measure in ("generated_accuracy", "choice_accuracy"):
        cell = by_arm["optimised"]["cells"][measure]
        shares = [sum(outcome.correct[measure]) / 10 for outcome in tuned]
        assert cell["spread"]["mean"] == pytest.approx(sum(shares) / 2)
        assert (cell["low"], cell["high"]) == pytest.approx(wilson(sum(shares) / 2, 10))
        pairs = [list(zip(original.correct[measure], one.correct[measure], strict=True)) for one in tuned]
        counts = [(pair.count((False, True)), pair.count((True, False))) for pair in pairs]
        assert (cell["gained"], cell["lost"]) == counts[0]
        assert cell["p"] == max(mcnemar_p(*count) for count in counts)
    assert by_arm["optimised"]["similarity"] >= 0.9
    assert by_arm["original"]["similarity"] is by_arm["original"]["cells"]["choice_accuracy"]["p"] is None
    budget = tuned[0].forward_tokens + tuned[0].backward_tokens
    assert tuned[0].backward_tokens > 0
    for name in ("few-shot", "paraphrases"):
        one = next(outcome for outcome in outcomes if outcome.arm == name)
        assert one.candidates >= 1
        assert one.backward_tokens == 0
        assert one.forward_tokens <= budget or one.candidates == 1
    text = (tmp_path / "runs/small-compare/compare.md").read_text()
    assert "best of paraphrases" in text
    assert "number 3" not in (tmp_path / "runs/small-compare/compare.json").read_text()  # no text of the data


def test_what_was_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(tmp_path, compare__arms=["original", "optimised"], compare__seeds=[0])
    first = compare(config)
    calls = []

    def evaluate(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    original = runner_module.evaluate
    monkeypatch.setattr(runner_module, "evaluate", evaluate)
    assert compare(config) == first
    assert not calls
    more = compare(configure(tmp_path, compare__arms=["original", "optimised"], compare__seeds=[0, 5]))
    assert len(calls) == 1
    assert more["outcomes"][:2] == first["outcomes"]
    with pytest.raises(ConfigError, match="holds arms of other settings"):
        compare(configure(tmp_path, optimize__learning_rate=2e-2))


def test_folds_are_pooled_and_every_item_is_tested_once(tmp_path: Path) -> None:
    config = configure(
        tmp_path, data__folds=3, data__split={"validation": 4}, compare__arms=["original", "optimised"],
        compare__seeds=[0],
    )  # fmt: skip
    found = compare(config)
    outcomes = [Outcome(**values) for values in found["outcomes"]]
    assert len(outcomes) == 6
    tested = [item for outcome in outcomes if outcome.arm == "optimised" for item in outcome.items]
    assert len(tested) == len(set(tested)) == 40
    line = next(line for line in lines(outcomes) if line.arm == "optimised")
    right = sum(sum(o.correct["choice_accuracy"]) for o in outcomes if o.arm == "optimised")
    assert line.cells["choice_accuracy"].spread.mean == pytest.approx(right / 40)
    assert "40 test items of 3 folds" in (tmp_path / "runs/small-compare/compare.md").read_text()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no arm 'orignal'"):
        compare(configure(tmp_path, compare__arms=["orignal"]))
    with pytest.raises(ConfigError, match="a comparison needs test data"):
        compare(configure(tmp_path, data__split={"train": 12, "validation": 4}, run__name="untested"))
    damaged = configure(tmp_path, compare__arms=["original"], run__name="damaged")
    place = tmp_path / "runs/damaged-compare/original/seed-0"
    place.mkdir(parents=True)
    (place / "result.json").write_text("{")
    with pytest.raises(ConfigError, match="remove it, and its arm is tested again"):
        compare(damaged)


def test_an_interruption_is_said_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(tmp_path, compare__arms=["original", "optimised"], compare__seeds=[0])
    original = runner_module.optimize

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise runner_module.Stopped("terminated")

    monkeypatch.setattr(runner_module, "optimize", interrupted)
    assert run(config, [], None, True, False) == 143
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(runner_module, "optimize", original)
    assert {line["arm"] for line in compare(config)["lines"]} == {"original", "optimised"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compare__shots": 13}, "the arm few-shot cannot be run: 13 demonstrations need"),
        ({"compare__paraphrases": ["Say it.", "word " * 400]}, "the arm paraphrases cannot be run: .*context"),
        ({"compare__paraphrases": ["Say <|im_end|> it."]}, "the arm paraphrases cannot be run: .*control token"),
        ({"data__labels": ["good", "evil"]}, r"data\.jsonl, line \d+ has the target 'bad'"),
    ],
)
def test_every_arm_is_checked_before_the_first_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(runner_module, "evaluate", None)
    monkeypatch.setattr(runner_module, "optimize", None)
    with pytest.raises(EmbedGradError, match=said):
        compare(configure(tmp_path, **changes))
