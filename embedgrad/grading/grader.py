"""What a grader is, and how a configuration names one."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from embedgrad.errors import ConfigError


@dataclass(frozen=True)
class Grade:
    """answer: what was read off the text; None where it holds no answer, or none of those allowed."""

    correct: bool
    answer: str | None


class Grader(ABC):
    """Decides about one generated text. Immutable; two graders with the same settings are equal.

    forced: whether a teacher-forced exact match of the target says as much as grading a greedily generated answer, so
    that a validation need not generate. sees_invalid: whether this grader can tell an invalid answer from a wrong one.
    """

    kind: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()  # what a configuration may say besides `kind`
    forced: ClassVar[bool] = False

    @property
    def sees_invalid(self) -> bool:
        """See the class."""
        return True

    @abstractmethod
    def grade(self, text: str, target: str) -> Grade:
        """`text` is what the model wrote, without its stop token; `target` is the example's."""

    def describe(self) -> dict[str, Any]:
        """The grader as JSON-able values; `make_grader` is the inverse."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.settings}}


def make_grader(values: str | Mapping[str, Any], labels: Sequence[str] | None = None) -> Grader:
    """The grader of a configuration: a kind, or a mapping with `kind` and that kind's settings.

    labels: all answers there are, for the kinds that want to know. Raises ConfigError: an unknown kind or setting, a
    value that is not usable, a kind whose package is not installed.
    """
    from embedgrad.grading.labels import Exact, GeneratedLabel
    from embedgrad.grading.mathematics import Boxed, Mathematics

    kinds: dict[str, type[Grader]] = {each.kind: each for each in (Exact, GeneratedLabel, Mathematics, Boxed)}
    rest: dict[str, Any] = {"kind": values} if isinstance(values, str) else dict(values)
    kind = rest.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"the grader is {kind!r}, but must be one of {', '.join(kinds)}.")
    chosen = kinds[kind]
    for name in rest:
        if name not in chosen.settings:
            near = difflib.get_close_matches(str(name), chosen.settings, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(chosen.settings) or 'none'}."
            raise ConfigError(f"the grader {kind!r} has no setting {name!r}{hint}")
    if issubclass(chosen, (Exact, GeneratedLabel)):
        rest["labels"] = tuple(labels or ())
    return chosen(**rest)
