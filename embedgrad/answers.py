"""What a set of generated answers looks like as a whole: how long, how varied, looping, cut off, valid.

The definitions beside those of `embedgrad.entropy` are our own, but for distinct-n (Li et al., "A Diversity-Promoting
Objective Function for Neural Conversation Models", NAACL 2016).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from embedgrad.generation import Generation
from embedgrad.grading.grader import Grade, Grader
from embedgrad.grading.labels import plain

TOKENS = 16  # an answer shorter than this has too few n-grams for a trajectory entropy that means anything


@dataclass(frozen=True)
class AnswerStatistics:
    """Of `answers` answers.

    tokens: mean length, without the stop token. truncated: share that reached the longest length or the context's end.
    invalid: share that holds no (allowed) answer; None where the grader cannot tell. loops: share that ends in a loop.
    token_entropy: mean over the answers of the mean over their tokens. distinct_1, distinct_2: different n-grams over
    all n-grams, of all answers together; 1 without any. trajectory_entropy, windowed_entropy: means over the `long`
    answers of at least TOKENS tokens, None without any (see `collapse`). answer_entropy: the Shannon entropy of the
    answers, as whole texts, over that of the targets, at most 1; 1 where all targets are the same.
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
        """At least one answer, each with its target and its grade."""
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
        """How varied the answers are, for the paper's sign of mode collapse ("trajectory entropy < 0.05").

        The entropy of an answer's n-grams says nothing about a short answer: by its definition
        (`embedgrad.entropy.trajectory_entropy`, n = 3) an answer of up to three tokens has value 1 whatever it says,
        one of four has 0 or 1. So where at least half of the answers are long (TOKENS tokens: 14 n-grams) it is their
        mean windowed trajectory entropy, which a loop at the end brings down. Otherwise, as with labels, a prompt
        collapses by giving everybody the same answer: there it is `answer_entropy`, 0 for one answer to all queries.
        """
        if 2 * self.long >= self.answers and self.windowed_entropy is not None:
            return self.windowed_entropy
        return self.answer_entropy

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values, `collapse` too."""
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
