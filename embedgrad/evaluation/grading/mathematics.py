"""Graders of mathematical answers: equal values (package `math-verify`), or equal text in the last \\boxed{}."""

from __future__ import annotations

import importlib.util
import logging
import re
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

from embedgrad.evaluation.grading.grader import Grade, Grader
from embedgrad.util.errors import ConfigError

SECONDS = 5  # time limit of math-verify for one expression
_COMMANDS = re.compile(r"\\(?:boxed|fbox)(?:\s*(\{)|\s+([^\s${}\\]+))")
_SILENT = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;: ]|\\q?quad(?![a-zA-Z])|[\s$]")


def last_boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{…} (or \\fbox{…}, or "\\boxed 7") in `text`, with matched braces.

    None where there is none or the last one is empty.
    """
    found = None
    for match in _COMMANDS.finditer(text):
        content = match[2] if match[1] is None else _braced(text, match.end())
        if content is not None:
            found = content
    return found if found is not None and found.strip() else None


def _braced(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes the one before `start`; None where no brace closes it."""
    depth, at = 1, start
    while at < len(text):
        if text[at] == "\\":  # \{ and \} are not braces
            at += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
        at += 1
    return None


def reference(target: str) -> str:
    """The answer in a target: the content of its last \\boxed{}, or the whole target."""
    boxed = last_boxed(target)
    return target.strip() if boxed is None else boxed


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

    def grade(self, text: str, target: str) -> Grade:
        """See `Grader`."""
        boxed = last_boxed(text)
        return Grade(boxed is not None and same_text(boxed, reference(target)), boxed)


@dataclass(frozen=True)
class Mathematics(Grader):
    """math-verify compares values: 1/2 and 0.5 are equal. Where it finds no equality, equal text decides.

    The answer is the content of the last \\boxed{}, else what math-verify finds after words such as "the final answer
    is". A text with neither is invalid, so that the intermediate numbers of a truncated text are not taken for its
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
        expected, boxed = reference(target), last_boxed(text)
        if boxed is None:
            found = _parse(text, anchored=True)
            return Grade(bool(found) and _equal(expected, found), str(found[-1]) if found else None)
        return Grade(_equal(expected, _parse(f"${boxed}$")) or same_text(boxed, expected), boxed)


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


def _equal(expected: str, found: list[Any]) -> bool:
    from math_verify import verify

    with _Unheard():
        return bool(verify(_parse(f"${expected}$"), found, timeout_seconds=_limit()))


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
