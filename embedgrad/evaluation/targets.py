"""Whether targets can be answers: each is a label where there are labels, and right as an answer to itself."""

from __future__ import annotations

from collections.abc import Sequence

from embedgrad.data.example import Example
from embedgrad.evaluation.grading.grader import Grader
from embedgrad.evaluation.grading.labels import same_answer
from embedgrad.util import shown
from embedgrad.util.errors import DataError
from embedgrad.util.shown import LONGEST, cut

_LONGEST = 80  # characters of a text that a message quotes


def check_targets(
    examples: Sequence[Example], what: str, labels: Sequence[str] | None = None, grader: Grader | None = None
) -> None:
    """Raises DataError where a target is not among `labels`, or `grader` does not find it right as an answer to itself.

    what: names an example that does not know its place, as in "training example" (its number from 1 follows). Targets
    of token ids are not looked at.
    """
    if labels is not None and (isinstance(labels, str) or not labels):
        raise DataError(f"labels must be a list of at least one text, not {short(labels)}.")
    seen: set[str] = set()
    for number, example in enumerate(examples, 1):
        target = example.target
        if not isinstance(target, str) or target in seen:
            continue
        seen.add(target)
        where = example.where or f"{what} {number}"
        if labels is not None and target not in labels:
            near = next((label for label in labels if same_answer(label, target)), None)
            hint = "" if near is None else f"; the label is written {short(near)}"
            known = cut(", ".join(labels), LONGEST)
            raise DataError(f"{where} has the target {short(target)}, which is not one of {known}{hint}.")
        if grader is not None:
            ideal = grader.ideal(target)
            grade = grader.grade(ideal, target)
            if not grade.correct:
                read = "no answer" if grade.answer is None else f"the answer {short(grade.answer)}"
                raise DataError(
                    f"{where}: the grader {grader.kind!r} does not find the target {short(target)} right as an answer "
                    f"to itself, for it reads {read} in {short(ideal)}; no answer could be right."
                )


def short(value: object) -> str:
    """`value` as a message about a target quotes it: shorter than elsewhere, because it quotes several."""
    return shown.short(value, _LONGEST)
