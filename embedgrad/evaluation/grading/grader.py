"""The interface of graders. A grader decides whether a generated text is the right answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Grade:
    """A grader's verdict. answer: the answer that it read from the text; None if there is none or it is not allowed."""

    correct: bool
    answer: str | None


class Grader(ABC):
    """Grades generated texts. Graders are immutable, and two graders with the same settings are equal.

    kind: name in a configuration. forced: whether an exact match of the target under teacher forcing gives the same
    verdict as grading a greedily generated answer, so that validations need not generate.
    """

    kind: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()  # the keys that a configuration may have besides `kind`
    forced: ClassVar[bool] = False

    @property
    def sees_invalid(self) -> bool:
        """Whether the grader can tell an invalid answer from a wrong one."""
        return True

    @abstractmethod
    def grade(self, text: str, target: str) -> Grade:
        """The grade of `text`, the generated answer without its stop token. `target` is the example's target."""

    def ideal(self, target: str) -> str:
        """A text that answers as `target` does, which `grade` must find right."""
        return target

    def describe(self) -> dict[str, Any]:
        """The grader as JSON-able values, from which `make_grader` makes it again."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.settings}}
