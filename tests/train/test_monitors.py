"""Monitors and alarms: each alarm goes off on a run that is built to fail in its way, and on no healthy run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from embedgrad.cli.progress import Bar, JsonLines
from embedgrad.data.example import Example
from embedgrad.evaluation.grading.grader import Grade, Grader
from embedgrad.evaluation.grading.labels import Exact, GeneratedLabel
from embedgrad.evaluation.neighbours import neighbours
from embedgrad.generation.sampling import Sampling
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.train.alarms import Alarms
from embedgrad.train.monitors import Judge
from embedgrad.train.optimize import OptimizeResult, optimize
from embedgrad.train.progress import Quiet
from embedgrad.train.settings import MonitorSection, OptimizeConfig
from embedgrad.util.errors import ConfigError
from tests.train.training import TRAIN, VALIDATION, outcome, quick_config, start_prompt, tiny_model

SEEN = [Example(f"film {letter}", label) for letter, label in zip("abcdefgh", ["x", "y"] * 4, strict=True)]
UNSEEN = [Example(f"film {letter}", label) for letter, label in zip("ijklmnop", ["y", "x"] * 4, strict=True)]
FAST = {"steps": 30, "batch_size": 8, "validate_every": 30, "schedule": "constant", "checkpoint_every": 30}
UNHELD = FAST | {"learning_rate": 0.1, "trust_region": "none"}


def only(label: str, examples: list[Example]) -> list[Example]:
    return [Example(example.query, label) for example in examples]


def run(
    train: list[Example], validation: list[Example] | None, settings: dict[str, Any], **options: Any
) -> OptimizeResult:
    model = tiny_model()
    prompt = SoftPrompt.from_text(model, "Say what it is, in one word, and say it at once to me: now.")
    return optimize(model, prompt, train, validation, quick_config(**settings), **options)


def signs(result: OptimizeResult) -> list[str]:
    return [alarm["sign"] for alarm in result.alarms]


def test_a_healthy_run_is_silent() -> None:
    result = run(SEEN, SEEN, FAST | {"learning_rate": 0.01, "trust_region": {"tau": 0.95}})
    assert result.validations[-1]["loss"] < result.validations[0]["loss"]
    assert result.alarms == []


def test_drift_sets_off_the_alarm_on_similarity_once() -> None:
    result = run(SEEN, None, UNHELD | {"steps": 6})
    assert signs(result) == ["similarity"]
    alarm = result.alarms[0]
    below = [record["similarity_min"] < 0.90 for record in result.history]
    assert below.index(True) == alarm["step"] - 1
    assert all(below[alarm["step"] - 1 :])
    assert alarm["value"] == result.history[alarm["step"] - 1]["similarity_min"]
    held = run(SEEN, None, UNHELD | {"steps": 6, "trust_region": {"tau": 0.95}})
    assert held.alarms == []


def test_overfitting_sets_off_the_alarm_on_the_gap() -> None:
    """Trained on one label and validated on another: training accuracy is 1, validation accuracy is 0."""
    result = run(only("x", SEEN), only("y", UNSEEN), UNHELD | {"monitors": {"similarity": "ignore"}})
    assert signs(result) == ["gap"]
    last = result.validations[-1]
    assert (last["train_accuracy"], last["accuracy"], last["gap"], last["train_examples"]) == (1, 0, 1, 8)
    assert last["gap_low"] > 0


def test_the_same_answer_to_all_sets_off_the_alarm_on_collapse() -> None:
    result = run(SEEN, UNSEEN, UNHELD | {"monitors": {"similarity": "ignore"}})
    assert "collapse" in signs(result)
    assert result.validations[0]["answers"]["collapse"] > 0.5
    assert result.validations[-1]["answers"]["collapse"] == 0


def test_answers_that_loop_set_off_the_alarm_on_collapse() -> None:
    """A bias makes the model repeat one token for ever; nothing else differs."""
    judge = Judge(sampling=Sampling(max_new_tokens=24, logit_bias={40: 1e4}))
    result = run(SEEN, UNSEEN, FAST | {"steps": 1, "learning_rate": 1e-6}, judge=judge)
    assert signs(result) == ["collapse"]
    answers = result.validations[-1]["answers"]
    assert (answers["long"], answers["loops"], answers["windowed_entropy"]) == (8, 1.0, 0.0)


@pytest.mark.parametrize(("action", "steps"), [("warn", 6), ("ignore", 6), ("stop", 1)])
def test_actions(action: str, steps: int, tmp_path: Path) -> None:
    result = run(SEEN, SEEN, UNHELD | {"steps": 6, "monitors": {"similarity": action}}, run_dir=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (result.steps, result.stop_reason) == (steps, "alarm" if action == "stop" else "completed")
    assert [line for line in lines if line["kind"] == "alarm"] == result.alarms
    assert bool(result.alarms) == (action != "ignore")
    again = run(
        SEEN, SEEN, UNHELD | {"steps": 6, "monitors": {"similarity": action}}, run_dir=tmp_path / "run", resume=True
    )
    assert (again.steps, again.alarms, again.stop_reason) == (result.steps, result.alarms, result.stop_reason)


def test_an_alarm_goes_off_again_only_after_the_sign_was_gone() -> None:
    def steps(*values: float) -> list[dict[str, Any]]:
        return [{"kind": "step", "step": i, "similarity_min": value} for i, value in enumerate(values, 1)]

    records = steps(0.95, 0.89, 0.88, 0.91, 0.85, 0.84)
    for known in range(len(records)):  # a resumed run goes on where the first one was
        alarms = Alarms(MonitorSection(), records[:known])
        rest = [alarm.step for record in records[known:] for alarm in alarms.check(record)]
        assert rest == [step for step in (2, 5) if step > known]


def test_a_gap_that_may_be_chance_and_the_starting_prompt_raise_no_alarm() -> None:
    alarms = Alarms(MonitorSection())
    record = {"kind": "validation", "step": 5, "gap": 0.4, "gap_low": -0.01}
    assert alarms.check(record) == []
    assert [alarm.sign for alarm in alarms.check(record | {"gap_low": 0.01})] == ["gap"]
    assert Alarms(MonitorSection()).check(record | {"gap_low": 0.01, "step": 0}) == []
    assert Alarms(MonitorSection()).check({"kind": "alarm", "step": 1}) == []


def test_thresholds_and_short_forms() -> None:
    section = OptimizeConfig(
        monitors={"similarity": "stop", "gap": {"threshold": 0.3}, "collapse": {"action": "ignore"}}
    )
    monitors = section.monitors
    assert (monitors.similarity.threshold, monitors.similarity.action) == (0.90, "stop")
    assert (monitors.gap.threshold, monitors.gap.action) == (0.3, "warn")
    assert (monitors.collapse.threshold, monitors.collapse.action) == (0.05, "ignore")
    assert OptimizeConfig(**section.model_dump(mode="json")) == section
    for wrong in ({"similarity": "shout"}, {"gap": {"treshold": 1}}, {"answers": -1}, {"entropy": "warn"}):
        with pytest.raises(ConfigError, match=r"monitors\."):
            OptimizeConfig(monitors=wrong)


def test_step_records_have_every_token() -> None:
    result = run(SEEN, None, FAST | {"steps": 3, "learning_rate": 0.02})
    for record in result.history:
        values = record["similarity"]
        assert len(values) == len(result.prompt.token_ids)
        assert min(values) == pytest.approx(record["similarity_min"], abs=1e-6)
        assert sum(values) / len(values) == pytest.approx(record["similarity_mean"], abs=1e-6)
        assert record["norm_ratio_min"] <= record["norm_ratio_mean"] <= record["norm_ratio_max"]
    assert result.history[-1]["similarity"] == [round(v, 6) for v in result.last_prompt.similarity().tolist()]


def test_validation_records_say_where_the_tokens_went_and_what_training_knows() -> None:
    model = tiny_model()
    result = run(SEEN, UNSEEN, UNHELD | {"steps": 5, "validate_every": 5})
    last = result.validations[-1]
    near = neighbours(model, result.last_prompt.embeddings, result.last_prompt.token_ids)
    assert last["nearest"] == near.nearest
    assert last["own_rank"] == near.own_rank
    assert last["moved_tokens"] == sum(rank > 1 for rank in near.own_rank)
    assert result.validations[0]["own_rank"] == [1] * len(near.nearest)
    assert last["train_accuracy"] == result.history[-1]["accuracy"]  # one batch is all there is
    assert last["train_examples"] == len(SEEN)
    assert "gap" not in result.validations[0]


def test_monitors_can_be_switched_off_and_change_nothing() -> None:
    on = run(SEEN, UNSEEN, FAST | {"steps": 4, "validate_every": 2})
    off = run(
        SEEN,
        UNSEEN,
        FAST | {"steps": 4, "validate_every": 2, "monitors": {"answers": 0, "train_examples": 0, "nearest": False}},
    )
    assert set(off.validations[0]) == {"kind", "step", "accuracy", "loss", "best"}
    assert {"answers", "gap", "nearest"} <= set(on.validations[-1])
    for one, other in zip(on.validations, off.validations, strict=True):
        assert (one["accuracy"], one["loss"]) == (other["accuracy"], other["loss"])
    assert on.prompt.embeddings.equal(off.prompt.embeddings)
    assert on.last_prompt.embeddings.equal(off.last_prompt.embeddings)


@dataclass(frozen=True)
class Vowels(Grader):
    """An answer is right if it has the letter e, which a teacher-forced pass cannot tell."""

    kind: ClassVar[str] = "vowels"

    def grade(self, text: str, target: str) -> Grade:
        return Grade("e" in text, text if "e" in text or "a" in text else None)


def test_a_grader_that_reads_answers_makes_validations_generate() -> None:
    model = tiny_model()
    judge = Judge(Vowels(), Sampling(max_new_tokens=12))
    result = optimize(model, start_prompt(model), TRAIN, VALIDATION, quick_config(steps=3), judge=judge)
    from embedgrad.generation.generate import generate

    for record, prompt in ((result.validations[0], start_prompt(model)), (result.validations[-1], result.last_prompt)):
        texts = [a.text for a in generate(model, prompt, [e.query for e in VALIDATION], judge.sampling)]
        weights = [example.weight for example in VALIDATION]
        right = sum(weight for text, weight in zip(texts, weights, strict=True) if "e" in text)
        assert record["accuracy"] == pytest.approx(right / sum(weights))
        assert record["answers"]["answers"] == 4
        assert record["answers"]["invalid"] == sum("e" not in t and "a" not in t for t in texts) / 4
    assert result.before == {name: result.validations[0][name] for name in ("accuracy", "loss")}


def test_who_decides_whether_accuracy_is_generated() -> None:
    assert not Judge().generates
    assert not Judge(Exact(("x",))).generates
    assert Judge(GeneratedLabel(("x",))).generates
    forced = run(SEEN, UNSEEN, FAST | {"steps": 1})
    generated = run(SEEN, UNSEEN, FAST | {"steps": 1, "accuracy_by": "generated"})
    for one, other in zip(forced.validations, generated.validations, strict=True):
        assert one["accuracy"] == other["accuracy"]  # exact answers: a forced match is what greedy generation gives


def test_generated_validations_resume_to_the_same_bits(tmp_path: Path) -> None:
    """Stopped in the middle of a validation's answers, the run validates again when it is resumed."""

    class StopAt(Quiet):
        def step(self, record: Mapping[str, Any]) -> None:
            if record["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)

    judge = Judge(GeneratedLabel(("positive", "negative")), Sampling(max_new_tokens=20))
    config = quick_config(monitors={"similarity": "warn", "collapse": {"threshold": 0.999}})
    model = tiny_model()

    def go(name: str, progress: Quiet) -> OptimizeResult:
        return optimize(
            model, start_prompt(model), TRAIN, VALIDATION, config, run_dir=tmp_path / name, resume="auto",
            judge=judge, progress=progress,
        )  # fmt: skip

    go("whole", Quiet())
    assert go("broken", StopAt()).steps == 3
    go("broken", Quiet())
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "broken")
    with pytest.raises(ConfigError, match=r"optimize\.grader"):
        optimize(model, start_prompt(model), TRAIN, VALIDATION, config, run_dir=tmp_path / "whole", resume=True)


def test_alarms_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    run(SEEN, None, UNHELD | {"steps": 2}, progress=JsonLines())
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    alarm = next(line for line in told if line["kind"] == "alarm")
    assert alarm["text"].startswith(f"alarm after step {alarm['step']}: a prompt token's similarity")
    run(SEEN, SEEN, UNHELD | {"steps": 2}, progress=Bar())
    said = capsys.readouterr().err
    assert "below 0.9: the prompt drifts" in said
    assert "training accuracy" in said


def test_training_accuracy_is_that_of_the_last_steps() -> None:
    """Three batches of 4, 4 and 3 make an epoch; 7 examples are the last two steps, or more where those were short."""
    model = tiny_model()
    config = quick_config(steps=7, validate_every=1, monitors={"train_examples": 7, "answers": 0})
    result = optimize(model, start_prompt(model), TRAIN, VALIDATION, config)
    sizes = [4, 4, 3, 4, 4, 3, 4]
    for validation in result.validations[1:]:
        wanted, right, seen = min(7, len(TRAIN)), 0.0, 0
        for step in range(validation["step"], 0, -1):
            if seen < wanted:
                right += result.history[step - 1]["accuracy"] * sizes[step - 1]
                seen += sizes[step - 1]
        assert validation["train_examples"] == seen
        assert validation["train_accuracy"] == pytest.approx(right / seen)
