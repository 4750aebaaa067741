"""What is watched while a prompt is optimised, beside loss and accuracy, and what watching costs.

Each step, from what the step has computed anyway: similarity to the anchor and norm ratio per token, gradient norm, and
the share of rows on the trust region's boundary. Each validation: training accuracy and its gap to validation accuracy
(of the examples of the last steps, each as it was just before its step, which costs nothing; where the grader needs
generated answers, of answers to some training examples); generated answers to some validation examples
and what they look like (`embedgrad.answers`); and each row's nearest vocabulary token and the rank of its own (one
product with the embedding table, `embedgrad.neighbours`). `MonitorSection` says how many examples; 0 and false switch
a part off. Nothing here changes the prompt; `embedgrad.alarms` decides what is a bad sign.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from embedgrad.answers import AnswerStatistics
from embedgrad.evaluation import default_sampling
from embedgrad.example import Example
from embedgrad.generation import Generation, write_answers
from embedgrad.grading.grader import Grade, Grader
from embedgrad.grading.labels import Exact
from embedgrad.model.model import Model
from embedgrad.neighbours import neighbours
from embedgrad.optimizer import StepReport
from embedgrad.prompt import SoftPrompt
from embedgrad.rendering import render_query
from embedgrad.sampling import Sampling
from embedgrad.settings import MonitorSection
from embedgrad.statistics import difference_interval, effective_number

DIGITS = 6  # of the similarities per token in a record; their minimum and mean are not rounded


@dataclass(frozen=True)
class Judge:
    """How a validation makes and judges answers.

    grader: see `embedgrad.grading`. sampling: None is greedy, as long as the validation's targets need. generated:
    whether accuracy is that of generated answers; None: only where the grader needs it, because for the others a
    teacher-forced exact match says the same and takes one forward pass.
    """

    grader: Grader = field(default_factory=Exact)
    sampling: Sampling | None = None
    generated: bool | None = None

    @property
    def generates(self) -> bool:
        """Whether accuracy is that of generated answers."""
        return not self.grader.forced if self.generated is None else self.generated

    def describe(self) -> dict[str, Any]:
        """As JSON-able values, for a run's identity."""
        sampling = None if self.sampling is None else {k: repr(v) for k, v in vars(self.sampling).items()}
        return {"grader": self.grader.describe(), "sampling": sampling, "generates": self.generates}


@dataclass(frozen=True)
class Answered:
    """Generated answers with their targets as text and their grades."""

    answers: list[Generation]
    targets: list[str]
    grades: list[Grade]

    def __add__(self, more: Answered) -> Answered:
        return Answered(self.answers + more.answers, self.targets + more.targets, self.grades + more.grades)

    def first(self, count: int) -> Answered:
        """The first `count` of them."""
        return Answered(self.answers[:count], self.targets[:count], self.grades[:count])


class Stopped(Exception):
    """Somebody asked to stop in the middle of answers."""


def step_figures(report: StepReport) -> dict[str, Any]:
    """For a step's record: of the cosines with the anchor the least, the mean and all of them; the norm ratios' least,
    mean and largest; the share of rows that the trust region moved back, so that they lie on its boundary."""
    return {
        "similarity_min": float(report.similarity.min()),
        "similarity_mean": float(report.similarity.mean()),
        "norm_ratio_min": float(report.norm_ratio.min()),
        "norm_ratio_mean": float(report.norm_ratio.mean()),
        "norm_ratio_max": float(report.norm_ratio.max()),
        "on_boundary": float(report.projected.double().mean()),
        "similarity": [round(value, DIGITS) for value in report.similarity.tolist()],
    }


class Monitors:
    """Watches one run."""

    def __init__(
        self,
        model: Model,
        train: Sequence[Example],
        validation: Sequence[Example],
        settings: MonitorSection,
        seed: int,
        judge: Judge,
        stop: Callable[[], bool],
    ) -> None:
        """`stop()`: whether somebody asked to stop. The training examples that are watched are drawn by `seed`."""
        self._model, self._settings, self._judge, self._stop = model, settings, judge, stop
        self._validation = list(validation)
        count = min(settings.train_examples, len(train))
        self._train = random.Random(f"{seed}/monitored").sample(list(train), count)
        self._sampling = judge.sampling
        if self._sampling is None and validation:
            self._sampling = default_sampling(model, [*self._train, *validation])

    def answered(self, prompt: SoftPrompt, examples: Sequence[Example]) -> Answered:
        """Answers to `examples`. Raises Stopped within one token where somebody asked to stop."""

        def heard(*_: int) -> None:
            if self._stop():
                raise Stopped

        rendered = [render_query(self._model, prompt, example.query) for example in examples]
        assert self._sampling is not None
        answers = write_answers(self._model, prompt, rendered, self._sampling, on_token=heard)
        targets = [self._text(example) for example in examples]
        grades = [self._judge.grader.grade(a.text, t) for a, t in zip(answers, targets, strict=True)]
        return Answered(answers, targets, grades)

    def validation_figures(
        self, prompt: SoftPrompt, accuracy: float, known: Answered | None, recent: tuple[float, int] | None
    ) -> dict[str, Any]:
        """For a validation's record.

        accuracy: on the validation data, weighted as the examples are. known: their answers, where they are there.
        recent: accuracy in the last steps, and of how many examples; None before the first. Raises Stopped.
        """
        figures: dict[str, Any] = {}
        if self._train and (recent is not None or self._judge.generates):
            figures |= self._gap(prompt, accuracy, recent)
        count = min(self._settings.answers, len(self._validation))
        if count:
            sample = known.first(count) if known is not None else self.answered(prompt, self._validation[:count])
            statistics = AnswerStatistics.of(sample.answers, sample.targets, sample.grades, self._judge.grader)
            figures["answers"] = statistics.to_dict()
        if self._settings.nearest:
            near = neighbours(self._model, prompt.embeddings, prompt.token_ids)
            figures |= {
                "nearest": near.nearest,
                "nearest_texts": self._model.tokenizer.texts(near.nearest),
                "nearest_cosine": [round(value, DIGITS) for value in near.cosine],
                "own_rank": near.own_rank,
                "moved_tokens": sum(rank > 1 for rank in near.own_rank),
            }
        return figures

    def _gap(self, prompt: SoftPrompt, accuracy: float, recent: tuple[float, int] | None) -> dict[str, Any]:
        """Training accuracy, the gap and its 95 % interval."""
        if self._judge.generates:
            weights = [example.weight for example in self._train]
            right = [float(grade.correct) for grade in self.answered(prompt, self._train).grades]
            train, examples, number = weighted_share(right, weights), len(right), effective_number(weights)
        else:
            assert recent is not None
            train, examples = recent
            number = examples
        held_out = effective_number([example.weight for example in self._validation])
        low, high = difference_interval(train, number, accuracy, held_out)
        return {
            "train_accuracy": train,
            "train_examples": examples,
            "gap": train - accuracy,
            "gap_low": low,
            "gap_high": high,
        }

    def _text(self, example: Example) -> str:
        """The target as text; as the model would write it, where it is token ids."""
        return example.target if isinstance(example.target, str) else self._model.tokenizer.decode(list(example.target))


def weighted_share(values: Sequence[float], weights: Sequence[float]) -> float:
    """Σ w x / Σ w, for x between 0 and 1."""
    total = math.fsum(weights)
    return min(1.0, math.fsum(value * (weight / total) for value, weight in zip(values, weights, strict=True)))
