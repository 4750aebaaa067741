"""The interface of a study, which runs arms of a comparison and describes the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedgrad.compare.arm import Arm, Training, only
from embedgrad.compare.arms import OPTIMISED, ORIGINAL
from embedgrad.compare.outcome import Outcome
from embedgrad.compare.runner import Runner
from embedgrad.evaluation.statistics import Accuracy
from embedgrad.prompt.prompt import SoftPrompt

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """The result of a study.

    data: JSON values, which include all numbers in the paragraph. paragraph: the result in words. figure: a matplotlib
    figure. table: a table of the figures in Markdown, or nothing.
    """

    data: dict[str, Any]
    paragraph: str
    figure: Any
    table: str = ""


@dataclass(frozen=True)
class Study:
    """A study. question: its question in one line. run: runs the arms; their outcomes are stored, so studies share
    them."""

    question: str
    run: Callable[[Runner], Finding]


def starting(text: str) -> Callable[[Runner], SoftPrompt]:
    """A function that makes the prompt of `text` in the configuration's template."""
    return lambda runner: SoftPrompt.from_text(runner.model, text, runner.plan.template(runner.model))


def original(runner: Runner) -> Outcome:
    """The outcome of the configuration's starting prompt."""
    return _first(runner, Arm(ORIGINAL, "the original text", only(lambda model: starting(runner.plan.prompt)(runner))))


def optimised(runner: Runner) -> tuple[Outcome, list[dict[str, Any]]]:
    """(outcome of the configuration's optimisation, its records)."""
    return trained(runner, OPTIMISED, "optimised", Training())


def trained(
    runner: Runner, name: str, title: str, training: Training, prompt: Callable[[Runner], SoftPrompt] | None = None
) -> tuple[Outcome, list[dict[str, Any]]]:
    """(outcome of an optimisation with the first seed, its records). prompt: makes the start; None: the
    configuration's."""
    start = own if prompt is None else prompt
    candidates = only(lambda model: start(runner))
    outcome = _first(runner, Arm(name, title, candidates, training))
    return outcome, runner.records(name, outcome.seed, outcome.fold)


def untrained(runner: Runner, name: str, title: str, prompt: Callable[[Runner], SoftPrompt]) -> Outcome:
    """The outcome of a prompt that is not optimised."""
    return _first(runner, Arm(name, title, only(lambda model: prompt(runner))))


def own(runner: Runner) -> SoftPrompt:
    """The configuration's start: a saved prompt, or that of its text."""
    return runner.plan.start(runner.model)


def _first(runner: Runner, arm: Arm) -> Outcome:
    return runner.run(arm, runner.plan.config.compare.seeds[0], runner.folds[0])


def steps_of(records: Sequence[Record]) -> list[Record]:
    """The records of optimiser steps."""
    return [record for record in records if record["kind"] == "step"]


def validations_of(records: Sequence[Record]) -> list[Record]:
    """The records of validations."""
    return [record for record in records if record["kind"] == "validation"]


def share(outcome: Outcome, measure: str = "generated_accuracy") -> Accuracy:
    """The accuracy on the test items by `measure`."""
    return Accuracy.of(outcome.correct[measure])


def main_measure(outcome: Outcome) -> str:
    """The measure that a study reports: the likeliest label where there are labels, else the generated answer.

    A starting prompt whose answers are sentences has no other accuracy than that of the likeliest label.
    """
    return "choice_accuracy" if "choice_accuracy" in outcome.correct else "generated_accuracy"
