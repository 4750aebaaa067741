"""Figures that are recorded during an optimisation in addition to loss and accuracy, and what they cost.

At each step, from values that the step computes anyway:
- similarity to the anchor and norm ratio of each prompt row, gradient norm, and the share of prompt rows on the trust
  region's boundary.

At each validation:
- training accuracy and its gap to validation accuracy. It is the accuracy on the examples of the last steps, each just
  before its step, which costs nothing. Where the grader needs generated answers, it is that of generated answers to
  some training examples.
- statistics of generated answers to some validation examples (`embedgrad.evaluation.answers`).
- for each prompt row the nearest token of the vocabulary and the rank of its own token, which costs one product with
  the embedding table (`embedgrad.evaluation.neighbours`).

`MonitorSection` sets the numbers of examples; 0 and false switch a part off. The monitors do not change the prompt.
`embedgrad.train.alarms` decides which figures are signs of failure.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from embedgrad.data.example import Example
from embedgrad.distributed.ranks import ALONE, Ranks, parts_of
from embedgrad.engine.model import Model
from embedgrad.evaluation.answers import AnswerStatistics
from embedgrad.evaluation.evaluate import default_sampling
from embedgrad.evaluation.grading.grader import Grade, Grader
from embedgrad.evaluation.grading.labels import Exact
from embedgrad.evaluation.neighbours import neighbours
from embedgrad.evaluation.statistics import difference_interval, effective_number
from embedgrad.generation.generate import Generation, write_answers
from embedgrad.generation.sampling import Sampling
from embedgrad.maths.optimizer import StepReport
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import render_query
from embedgrad.train.settings import MonitorSection

DIGITS = 6  # decimal places of the similarities in a record; their minimum and mean are not rounded


@dataclass(frozen=True)
class Judge:
    """How a validation makes and grades answers.

    grader: see `embedgrad.evaluation.grading`.
    sampling: None: greedy, with enough tokens for the longest training or validation target.
    generated: whether accuracy is that of generated answers. None: only where the grader needs them; for the other
        graders an exact match under teacher forcing gives the same verdict with one forward pass.
    """

    grader: Grader = field(default_factory=Exact)
    sampling: Sampling | None = None
    generated: bool | None = None

    @property
    def generates(self) -> bool:
        """Whether accuracy is that of generated answers."""
        return not self.grader.forced if self.generated is None else self.generated

    def describe(self) -> dict[str, Any]:
        """The settings as JSON-able values, for a run's identity."""
        sampling = None if self.sampling is None else {k: repr(v) for k, v in vars(self.sampling).items()}
        return {"grader": self.grader.describe(), "sampling": sampling, "generates": self.generates}


@dataclass(frozen=True)
class Answered:
    """Generated answers with their targets (as text) and grades."""

    answers: list[Generation]
    targets: list[str]
    grades: list[Grade]

    def __add__(self, more: Answered) -> Answered:
        return Answered(self.answers + more.answers, self.targets + more.targets, self.grades + more.grades)

    def to_json(self) -> list[list[Any]]:
        """All fields as JSON-able values."""
        return [[asdict(a), t, asdict(g)] for a, t, g in zip(self.answers, self.targets, self.grades, strict=True)]

    @classmethod
    def from_json(cls, values: Sequence[Sequence[Any]]) -> Answered:
        """The inverse of `to_json`."""
        return cls(
            [Generation(**answer) for answer, _, _ in values],
            [target for _, target, _ in values],
            [Grade(**grade) for _, _, grade in values],
        )

    def first(self, count: int) -> Answered:
        """The first `count` answers."""
        return Answered(self.answers[:count], self.targets[:count], self.grades[:count])


class Stopped(Exception):
    """A request to stop arrived while answers were generated."""


def step_figures(report: StepReport) -> dict[str, Any]:
    """The figures for a step's record.

    They are all cosines with the anchor, their minimum and mean; the minimum, mean and maximum of the norm ratios; and
    the share of prompt rows that the trust region projected, so that they lie on its boundary.
    """
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
    """Computes the figures of one run."""

    def __init__(
        self,
        model: Model,
        train: Sequence[Example],
        validation: Sequence[Example],
        settings: MonitorSection,
        seed: int,
        judge: Judge,
        stop: Callable[[], bool],
        ranks: Ranks = ALONE,
    ) -> None:
        """seed: draws the training examples for which answers are generated. stop: whether to stop now. ranks: share
        the answers, and make the same calls."""
        self._model, self._settings, self._judge, self._stop = model, settings, judge, stop
        self._ranks = ranks
        self._validation = list(validation)
        count = min(settings.train_examples, len(train))
        self._train = random.Random(f"{seed}/monitored").sample(list(train), count)
        self._sampling = judge.sampling
        if self._sampling is None and validation:
            self._sampling = default_sampling(model, [*self._train, *validation])

    def answered(self, prompt: SoftPrompt, examples: Sequence[Example]) -> Answered:
        """Generated answers to `examples`, of which each rank writes its share. Raises Stopped within one token after
        a request to stop."""
        own = parts_of(len(examples), self._ranks)[self._ranks.rank]
        try:
            answered: Answered | None = self._answered(prompt, examples[own.start : own.stop], own.start)
        except Stopped:
            answered = None
        if self._ranks.size == 1 and answered is not None:
            return answered
        told = self._ranks.gather(None if answered is None else answered.to_json())
        if None in told:
            raise Stopped
        return sum((Answered.from_json(each) for each in told), Answered([], [], []))

    def _answered(self, prompt: SoftPrompt, examples: Sequence[Example], first_stream: int) -> Answered:
        def heard(*_: int) -> None:
            if self._stop():
                raise Stopped

        rendered = [render_query(self._model, prompt, example.query) for example in examples]
        assert self._sampling is not None
        answers = write_answers(
            self._model, prompt, rendered, self._sampling, on_token=heard, first_stream=first_stream
        )
        targets = [self._text(example) for example in examples]
        grades = [self._judge.grader.grade(a.text, t) for a, t in zip(answers, targets, strict=True)]
        return Answered(answers, targets, grades)

    def validation_figures(
        self, prompt: SoftPrompt, accuracy: float, known: Answered | None, recent: tuple[float, int] | None
    ) -> dict[str, Any]:
        """The figures for a validation's record. Raises Stopped.

        accuracy: accuracy on the validation data, weighted by the examples' weights. known: the answers to the
        validation data if they were generated, else None. recent: (accuracy in the last steps, number of their
        examples); None before the first step.
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
        """The target as text; token ids are decoded."""
        return example.target if isinstance(example.target, str) else self._model.tokenizer.decode(list(example.target))


def weighted_share(values: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean Σ w x / Σ w of values x between 0 and 1."""
    total = math.fsum(weights)
    return min(1.0, math.fsum(value * (weight / total) for value, weight in zip(values, weights, strict=True)))
