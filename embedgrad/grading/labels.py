"""Graders of short answers: the whole text is the answer, or a pattern finds it in the text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from embedgrad.errors import ConfigError
from embedgrad.grading.grader import Grade, Grader


def plain(text: str) -> str:
    """A text less what does not make it another answer: case, surrounding white space, a final full stop."""
    return text.strip().removesuffix(".").strip().casefold()


def same_answer(answer: str, target: str) -> bool:
    """Whether two answers are the same but for case, surrounding white space and a final full stop."""
    return plain(answer) == plain(target)


@dataclass(frozen=True)
class Exact(Grader):
    """The whole text must be the target (`same_answer`). Where the labels are known, any other text is invalid.

    A teacher-forced exact match says the same, but for answers that differ from the target in case, space or a full
    stop: those only generation finds right.
    """

    labels: tuple[str, ...] = ()
    kind: ClassVar[str] = "exact"
    forced: ClassVar[bool] = True

    @property
    def sees_invalid(self) -> bool:
        """Only where the labels are known."""
        return bool(self.labels)

    def grade(self, text: str, target: str) -> Grade:
        """See `Grader`."""
        known = next((label for label in self.labels if same_answer(text, label)), None)
        return Grade(same_answer(text, target), text.strip() if not self.labels else known)


@dataclass(frozen=True)
class GeneratedLabel(Grader):
    """A regular expression finds the label in the text; a text without a match is invalid.

    pattern: Python syntax, case ignored; its first group, or the whole match where it has none, is the answer. None:
    any of the labels as a word of its own. which: the first match of the text counts, or the last.
    """

    labels: tuple[str, ...] = ()
    pattern: str | None = None
    which: str = "first"
    kind: ClassVar[str] = "label"
    settings: ClassVar[tuple[str, ...]] = ("pattern", "which")

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.which not in ("first", "last"):
            raise ConfigError(f"which is {self.which!r}, but must be first or last.")
        if self.pattern is None and not self.labels:
            raise ConfigError("the grader 'label' needs a pattern, or data with labels.")
        _ = self._compiled

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        if self.pattern is None:
            longest_first = sorted(self.labels, key=len, reverse=True)  # "not sure" before "not"
            return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)
        if not isinstance(self.pattern, str):
            raise ConfigError(f"pattern is {self.pattern!r}, but must be a regular expression.")
        try:
            return re.compile(self.pattern, re.IGNORECASE)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"pattern is {self.pattern!r}, which is no regular expression: {error}.") from None

    def grade(self, text: str, target: str) -> Grade:
        """See `Grader`."""
        found = None
        for match in self._compiled.finditer(text):
            found = match[1] if self._compiled.groups else match[0]
            if self.which == "first":
                break
        if found is None or (self.labels and not any(same_answer(found, label) for label in self.labels)):
            return Grade(False, None)
        return Grade(same_answer(found, target), found.strip())
