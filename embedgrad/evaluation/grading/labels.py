"""Graders of short answers: the whole text is the answer, or a pattern finds the answer in the text."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from embedgrad.evaluation.grading.grader import Grade, Grader
from embedgrad.evaluation.grading.label_finder import LabelFinder
from embedgrad.util.errors import ConfigError

# The full stops of the world's scripts: Latin, CJK, Devanagari, Arabic and Urdu, Armenian, Ethiopic, Burmese, Khmer,
# Tibetan, Canadian syllabics, Mongolian, Lisu, Vai, Coptic.
_FULL_STOPS = ".。｡．︒﹒।॥۔։።။។༎།᙮᠃᠉꓿꘎⳾"


def plain(text: str) -> str:
    """`text` without case, surrounding white space and a final full stop, which make no difference to an answer.

    Unicode's composed and decomposed forms are one text.
    """
    text = unicodedata.normalize("NFC", text).strip()
    return (text[:-1] if text[-1:] in _FULL_STOPS else text).strip().casefold()


def same_answer(answer: str, target: str) -> bool:
    """Whether two answers are equal if case, surrounding white space and a final full stop are ignored."""
    return plain(answer) == plain(target)


@dataclass(frozen=True)
class Exact(Grader):
    """The whole text must be the target (`same_answer`). If labels are given, any text but a label is invalid.

    An exact match under teacher forcing gives the same verdict, except for answers that differ from the target in case,
    white space or a full stop. They count as right only when they are generated.
    """

    labels: tuple[str, ...] = ()
    kind: ClassVar[str] = "exact"
    forced: ClassVar[bool] = True

    @property
    def sees_invalid(self) -> bool:
        """Whether labels are given."""
        return bool(self.labels)

    def grade(self, text: str, target: str) -> Grade:
        """See `Grader`."""
        known = next((label for label in self.labels if same_answer(text, label)), None)
        return Grade(same_answer(text, target), text.strip() if not self.labels else known)


@dataclass(frozen=True)
class GeneratedLabel(Grader):
    """A regular expression finds the label in the text. A text without a match is invalid.

    pattern: a Python regular expression; case is ignored. The answer is its first capturing group, or the whole match
    if it has none. None: any of the labels as a separate word (`LabelFinder`). which: "first" or "last", the match that
    counts.
    """

    labels: tuple[str, ...] = ()
    pattern: str | None = None
    which: str = "first"
    kind: ClassVar[str] = "label"
    settings: ClassVar[tuple[str, ...]] = ("pattern", "which")

    def __post_init__(self) -> None:
        """Raises ConfigError for an invalid setting, or where both pattern and labels are missing."""
        if self.which not in ("first", "last"):
            raise ConfigError(f"which is {self.which!r}, but must be first or last.")
        if self.pattern is None and not self.labels:
            raise ConfigError("the grader 'label' needs a pattern, or data with labels.")
        _ = self._compiled

    @cached_property
    def _finder(self) -> LabelFinder:
        return LabelFinder(self.labels)

    @cached_property
    def _compiled(self) -> re.Pattern[str] | None:
        if self.pattern is None:
            return None
        if not isinstance(self.pattern, str):
            raise ConfigError(f"pattern is {self.pattern!r}, but must be a regular expression.")
        try:
            return re.compile(self.pattern, re.IGNORECASE)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"pattern is {self.pattern!r}, which is no regular expression: {error}.") from None

    def grade(self, text: str, target: str) -> Grade:
        """See `Grader`."""
        if self._compiled is None:
            label = self._finder.find(text, self.which == "last")
            return Grade(False, None) if label is None else Grade(same_answer(label.label, target), label.written)
        found = self._matched(self._compiled, text)
        if found is None or (self.labels and not any(same_answer(found, label) for label in self.labels)):
            return Grade(False, None)
        expected = None if same_answer(found, target) else self._matched(self._compiled, target)
        return Grade(same_answer(found, target if expected is None else expected), found.strip())

    def _matched(self, pattern: re.Pattern[str], text: str) -> str | None:
        """What the pattern finds in `text`; None where it finds nothing."""
        found = None
        for match in pattern.finditer(text):
            found = match[1] if pattern.groups else match[0]
            if self.which == "first":
                break
        return found
