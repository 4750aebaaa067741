"""What a study is: it runs arms of a comparison, and says what was seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedgrad.compare.arm import Arm, Training, only
from embedgrad.compare.arms import OPTIMISED, ORIGINAL
from embedgrad.compare.outcome import Outcome
from embedgrad.compare.runner import Runner
from embedgrad.prompt import SoftPrompt
from embedgrad.statistics import Accuracy

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """data: JSON values, all figures of the paragraph among them. paragraph: what was seen, for people. figure: of
    matplotlib."""

    data: dict[str, Any]
    paragraph: str
    figure: Any


@dataclass(frozen=True)
class Study:
    """question: one line. run: does what it takes; the arms' runs are kept, so that studies share them."""

    question: str
    run: Callable[[Runner], Finding]


def starting(text: str) -> Callable[[Runner], SoftPrompt]:
    """The prompt that says `text`, in the configuration's template."""
    return lambda runner: SoftPrompt.from_text(runner.model, text, runner.plan.template(runner.model))


def original(runner: Runner) -> Outcome:
    """The configuration's prompt as it starts."""
    return _first(runner, Arm(ORIGINAL, "the original text", _own(runner)))


def optimised(runner: Runner) -> tuple[Outcome, list[dict[str, Any]]]:
    """The configuration's optimisation, and its records."""
    return trained(runner, OPTIMISED, "optimised", Training())


def trained(
    runner: Runner, name: str, title: str, training: Training, prompt: Callable[[Runner], SoftPrompt] | None = None
) -> tuple[Outcome, list[dict[str, Any]]]:
    """An optimisation of the first seed, and its records."""
    candidates = _own(runner) if prompt is None else only(lambda model: prompt(runner))
    outcome = _first(runner, Arm(name, title, candidates, training))
    return outcome, runner.records(name, outcome.seed, outcome.fold)


def untrained(runner: Runner, name: str, title: str, prompt: Callable[[Runner], SoftPrompt]) -> Outcome:
    """A prompt as it is."""
    return _first(runner, Arm(name, title, only(lambda model: prompt(runner))))


def _own(runner: Runner) -> Any:
    start = starting(runner.plan.prompt)
    return only(lambda model: start(runner))


def _first(runner: Runner, arm: Arm) -> Outcome:
    return runner.run(arm, runner.plan.config.compare.seeds[0], runner.folds[0])


def steps_of(records: Sequence[Record]) -> list[Record]:
    """The records of steps."""
    return [record for record in records if record["kind"] == "step"]


def validations_of(records: Sequence[Record]) -> list[Record]:
    """The records of validations."""
    return [record for record in records if record["kind"] == "validation"]


def share(outcome: Outcome, measure: str = "generated_accuracy") -> Accuracy:
    """Of the test items."""
    return Accuracy.of(outcome.correct[measure])


def main_measure(outcome: Outcome) -> str:
    """The likeliest label where there are labels, because a start that writes sentences has no other accuracy; else the
    answer as generated."""
    return "choice_accuracy" if "choice_accuracy" in outcome.correct else "generated_accuracy"


def percent(accuracy: Accuracy) -> str:
    """Such as "88.8 % [85.7, 91.3]"."""
    return f"{100 * accuracy.value:.1f} % [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"
