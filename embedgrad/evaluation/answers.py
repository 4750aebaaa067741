"""Statistics of a set of generated answers: length, variety, loops, truncation, validity.

distinct-n is defined by Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", NAACL
2016. The other definitions are our own, here and in `embedgrad.generation.entropy`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from embedgrad.evaluation.grading.grader import Grade, Grader
from embedgrad.evaluation.grading.labels import plain
from embedgrad.generation.generate import Generation

TOKENS = 16  # a shorter answer has too few n-grams for a meaningful trajectory entropy


@dataclass(frozen=True)
class AnswerStatistics:
    """Statistics of `answers` answers.

    tokens: mean length in tokens, without the stop token.
    truncated: share that ended at max_new_tokens or at the model's context length.
    invalid: share that the grader reads no (allowed) answer from; None where the grader cannot tell.
    loops: share that ends in a loop.
    token_entropy: mean over the answers of their mean token entropy.
    distinct_1, distinct_2: number of distinct n-grams divided by the number of all n-grams, over all answers together;
        1 without n-grams.
    long: number of answers of at least TOKENS tokens.
    trajectory_entropy, windowed_entropy: means over the long answers; None without any.
    answer_entropy: Shannon entropy of the answers as whole texts, divided by that of the targets, at most 1; 1 where
        all targets are the same.
    """

    answers: int
    tokens: float
    truncated: float
    invalid: float | None
    loops: float
    token_entropy: float
    distinct_1: float
    distinct_2: float
    long: int
    trajectory_entropy: float | None
    windowed_entropy: float | None
    answer_entropy: float

    @classmethod
    def of(
        cls, answers: Sequence[Generation], targets: Sequence[str], grades: Sequence[Grade], grader: Grader
    ) -> AnswerStatistics:
        """The statistics of at least one answer; `targets` and `grades` belong to the answers, in the same order."""
        long = [answer for answer in answers if len(answer.ids) >= TOKENS]
        return cls(
            answers=len(answers),
            tokens=_mean(len(answer.ids) for answer in answers),
            truncated=_mean(answer.stop_reason in ("length", "context") for answer in answers),
            invalid=_mean(grade.answer is None for grade in grades) if grader.sees_invalid else None,
            loops=_mean(answer.loop_period > 0 for answer in answers),
            token_entropy=_mean(_mean(answer.entropies) for answer in answers),
            distinct_1=_distinct(answers, 1),
            distinct_2=_distinct(answers, 2),
            long=len(long),
            trajectory_entropy=_mean(answer.trajectory_entropy for answer in long) if long else None,
            windowed_entropy=_mean(answer.windowed_entropy for answer in long) if long else None,
            answer_entropy=_relative_entropy([plain(answer.text) for answer in answers], list(map(plain, targets))),
        )

    @property
    def collapse(self) -> float:
        """The entropy for the paper's sign of mode collapse, "trajectory entropy < 0.05".

        The entropy of an answer's n-grams says nothing about a short answer: by its definition
        (`embedgrad.generation.entropy.trajectory_entropy`, n = 3) it is 1 for any answer of up to three tokens, and 0
        or 1 for four tokens. So it is used only where at least half of the answers are long (TOKENS tokens, 14
        n-grams): the result is then their mean windowed trajectory entropy, which a loop at the end lowers. With short
        answers, such as labels, a collapsed prompt gives the same answer to all queries. There the result is
        `answer_entropy`, which is 0 in that case.
        """
        if 2 * self.long >= self.answers and self.windowed_entropy is not None:
            return self.windowed_entropy
        return self.answer_entropy

    def to_dict(self) -> dict[str, Any]:
        """All fields, and `collapse`, as JSON-able values."""
        return {**asdict(self), "collapse": self.collapse}


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else 0.0


def _distinct(answers: Sequence[Generation], n: int) -> float:
    found = [tuple(a.ids[i : i + n]) for a in answers for i in range(len(a.ids) - n + 1)]
    return len(set(found)) / len(found) if found else 1.0


def _relative_entropy(texts: Sequence[str], targets: Sequence[str]) -> float:
    most = _entropy(targets)
    return min(1.0, _entropy(texts) / most) if most else 1.0


def _entropy(texts: Sequence[str]) -> float:
    total = len(texts)
    return math.fsum(n / total * math.log(total / n) for n in Counter(texts).values())
