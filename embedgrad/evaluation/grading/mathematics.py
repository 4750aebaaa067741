"""Graders of mathematical answers: equal values (package `math-verify`), or equal text in the last \\boxed{}.

What a text says its answer is (`stated`): the last \\boxed{}, else what follows "####" (the form of GSM8K), else what
follows words such as "the answer is" or "答案是".
"""

from __future__ import annotations

import importlib.util
import logging
import re
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

from embedgrad.evaluation.grading.grader import Grade, Grader
from embedgrad.evaluation.grading.stated import few_words, is_bare, last_boxed, said, stated
from embedgrad.util.errors import ConfigError

SECONDS = 5  # time limit of math-verify for one expression
_SILENT = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;: ]|\\q?quad(?![a-zA-Z])|[\s$]")


def reference(target: str) -> str:
    """The answer in a target: what it says that its answer is (`stated`), or the whole target."""
    found = stated(target)
    return target.strip() if found is None else found


def _boxed_unless_stated(target: str) -> str:
    return target if stated(target) is not None else f"\\boxed{{{target.strip()}}}"


def same_text(one: str, other: str) -> bool:
    """Whether two LaTeX answers are the same text.

    Spacing, dollar signs, \\left and \\right, a final full stop, and \\dfrac or \\tfrac for \\frac are ignored.
    """

    def bare(text: str) -> str:
        text = _SILENT.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
        return text.removesuffix(".")

    return bare(one) == bare(other)


@dataclass(frozen=True)
class Boxed(Grader):
    """The last \\boxed{} of the text must hold the target's answer (`reference`) as equal text (`same_text`)."""

    kind: ClassVar[str] = "boxed"

    def ideal(self, target: str) -> str:
        """The target's answer in a box."""
        return f"\\boxed{{{reference(target)}}}"

    def grade(self, text: str, target: str) -> Grade:
        """See `Grader`."""
        boxed = last_boxed(text)
        return Grade(boxed is not None and same_text(boxed, reference(target)), boxed)


@dataclass(frozen=True)
class Mathematics(Grader):
    """math-verify compares values: 1/2 and 0.5 are equal. Where it finds no equality, equal text decides.

    The answer is the content of the last \\boxed{}, else what follows "####", else what math-verify finds after words
    such as "the final answer is", or what follows such words in other languages, else the whole text where it is a bare
    expression. Any other text is invalid, so that the intermediate numbers of a truncated text are not taken for its
    answer. An expression that math-verify cannot decide within 5 seconds counts as different. Outside the main thread
    there is no time limit. Raises ConfigError where math-verify is not installed.
    """

    kind: ClassVar[str] = "math"

    def __post_init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "the grader 'math' needs a package: pip install embedgrad[math]; the grader 'boxed' compares texts."
            )

    def grade(self, text: str, target: str) -> Grade:
        """See `Grader`."""
        expected, answer = reference(target), stated(text, words=False)
        if answer is None:
            found = _parse(text, anchored=True)
            if found:
                return Grade(_equal(expected, found), str(found[-1]))
            answer = said(text)
        if answer is None and (is_bare(text) or (few_words(text) and same_text(text, expected))):
            answer = text.strip()
        if answer is None:
            return Grade(False, None)
        return Grade(same_text(answer, expected) or _equal(expected, _value(answer)), answer)

    def ideal(self, target: str) -> str:
        """The target; in a box where it is a short answer that says nothing of the kind."""
        return _boxed_unless_stated(target) if few_words(target) else target


def _parse(text: str, anchored: bool = False) -> list[Any]:
    """The expressions that math-verify reads from `text`; empty where there are none.

    anchored: only after words such as "the final answer is".
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    with _Unheard():
        found = parse(
            text,
            [
                LatexExtractionConfig(try_extract_without_anchor=not anchored),
                ExprExtractionConfig(try_extract_without_anchor=not anchored),
            ],
            fallback_mode="no_fallback" if anchored else "first_match",
            parsing_timeout=_limit(),
        )
    return list(found)


def _value(answer: str) -> list[Any]:
    """The expressions in an answer: all of it is one, or it stands among words, as in "45 pens"."""
    return _parse(f"${answer}$" if is_bare(answer) or not few_words(answer) else answer) or _parse(f"${answer}$")


def _equal(expected: str, found: list[Any]) -> bool:
    from math_verify import verify

    with _Unheard():
        return bool(verify(_value(expected), found, timeout_seconds=_limit()))


def _limit() -> int | None:
    """math-verify's time limit in seconds. It uses an alarm signal, which Python allows in the main thread only."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None


class _Unheard:
    """Inside the block math-verify logs nothing. It would log every text that it cannot parse, which is normal here."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("math_verify")
        self._before = self._logger.level
        self._logger.setLevel(logging.CRITICAL + 1)

    def __exit__(self, *error: object) -> None:
        self._logger.setLevel(self._before)
