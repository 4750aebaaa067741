"""How well a prompt does on labelled examples: by what the model writes, and by which label it finds most likely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from embedgrad.answers import AnswerStatistics
from embedgrad.choice import LabelChooser
from embedgrad.errors import DataError
from embedgrad.example import Example, check_examples
from embedgrad.generation import Generation, check_room, write_answers
from embedgrad.grading.grader import Grade, Grader
from embedgrad.grading.labels import Exact, same_answer
from embedgrad.model.model import Model
from embedgrad.prompt import SoftPrompt
from embedgrad.rendering import Rendered, render_query
from embedgrad.sampling import Sampling
from embedgrad.statistics import Accuracy, McNemar

__all__ = [
    "Accuracy", "Evaluation", "Record", "check_evaluation", "default_sampling", "evaluate", "paired_tests",
    "same_answer",
]  # fmt: skip

MEASURES = {
    "generated_accuracy": "answer as generated",
    "choice_accuracy": "likeliest label",
    "choice_normalised_accuracy": "likeliest label, per token",
    "choice_calibrated_accuracy": "likeliest label, calibrated",
}
_SPARE = 8  # tokens that an answer may be longer than the longest target


@dataclass(frozen=True)
class Record:
    """One example: what was asked and expected, what the model wrote, what the grader read off it, why and after how
    many tokens it ended, and the labels it finds most likely (`embedgrad.choice`)."""

    query: str | Sequence[int]
    target: str
    generated: str
    generated_correct: bool
    choice: str | None
    choice_normalised: str | None = None
    choice_calibrated: str | None = None
    answer: str | None = None
    stop_reason: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class Evaluation:
    """generated_accuracy: the answer that was written is right, as the grader says. choice_accuracy and its normalised
    and calibrated forms (with labels): the label with the highest score is the target. statistics: of the answers, the
    share of invalid and of truncated ones among them."""

    generated_accuracy: Accuracy
    choice_accuracy: Accuracy | None
    records: list[Record]
    choice_normalised_accuracy: Accuracy | None
    choice_calibrated_accuracy: Accuracy | None
    grader: dict[str, Any]
    statistics: AnswerStatistics

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return {**asdict(self), "statistics": self.statistics.to_dict()}

    def correct(self, measure: str) -> list[bool]:
        """Which records are right by one of MEASURES."""
        if measure == "generated_accuracy":
            return [record.generated_correct for record in self.records]
        name = measure.removesuffix("_accuracy")
        return [getattr(record, name) == record.target for record in self.records]


def evaluate(
    model: Model,
    prompt: SoftPrompt,
    examples: Sequence[Example],
    labels: Sequence[str] | None = None,
    sampling: Sampling | None = None,
    grader: Grader | None = None,
) -> Evaluation:
    """Generate an answer to every example and grade it; with `labels`, also ask which of them is most likely.

    sampling: default greedy, as many tokens as the longest target (and label) needs and eight more. grader: default
    `embedgrad.grading.labels.Exact`, the same text but for case, surrounding white space and a final full stop. Raises
    DataError (no examples, a target that is not text or not among the labels) and what `generate` raises.
    """
    rendered, chooser = _prepared(model, prompt, examples, labels)
    grader = Exact(tuple(labels or ())) if grader is None else grader
    sampling = default_sampling(model, examples, labels) if sampling is None else sampling
    answers = write_answers(model, prompt, rendered, sampling, on_prefill=chooser)
    targets = [str(example.target) for example in examples]
    grades = [grader.grade(answer.text, target) for answer, target in zip(answers, targets, strict=True)]
    records = [_record(*each) for each in zip(examples, answers, grades, strict=True)]
    if chooser is not None:
        chosen = zip(records, chooser.choices(), strict=True)
        records = [
            replace(r, choice=c.plain, choice_normalised=c.normalised, choice_calibrated=c.calibrated)
            for r, c in chosen
        ]

    def share(name: str) -> Accuracy | None:
        return None if chooser is None else Accuracy.of([getattr(r, name) == r.target for r in records])

    return Evaluation(
        Accuracy.of([record.generated_correct for record in records]),
        share("choice"),
        records,
        share("choice_normalised"),
        share("choice_calibrated"),
        grader.describe(),
        AnswerStatistics.of(answers, targets, grades, grader),
    )


def _record(example: Example, answer: Generation, grade: Grade) -> Record:
    return Record(
        example.query, str(example.target), answer.text, grade.correct, None,
        answer=grade.answer, stop_reason=answer.stop_reason, tokens=len(answer.ids),
    )  # fmt: skip


def paired_tests(before: Evaluation, after: Evaluation) -> dict[str, McNemar]:
    """McNemar's exact test of each measure that both have, on the same examples in the same order."""
    return {
        name: McNemar.of(before.correct(name), after.correct(name))
        for name in MEASURES
        if getattr(before, name) is not None and getattr(after, name) is not None
    }


def default_sampling(model: Model, examples: Sequence[Example], labels: Sequence[str] | None = None) -> Sampling:
    """Greedy, as many tokens as the longest target (and label) needs and eight more."""
    lengths = [len(example.target) for example in examples if not isinstance(example.target, str)]
    texts = {example.target for example in examples if isinstance(example.target, str)} | set(labels or ())
    lengths += [len(model.tokenizer.encode(text)) for text in texts]
    return Sampling(max_new_tokens=max(lengths) + _SPARE)


def check_evaluation(
    model: Model, prompt: SoftPrompt, examples: Sequence[Example], labels: Sequence[str] | None = None
) -> None:
    """Raises what `evaluate` would refuse these examples with, without computing anything."""
    rendered, _ = _prepared(model, prompt, examples, labels)
    check_room(model, rendered)


def _prepared(
    model: Model, prompt: SoftPrompt, examples: Sequence[Example], labels: Sequence[str] | None
) -> tuple[list[Rendered], LabelChooser | None]:
    """The queries' contexts, and what finds the likeliest of `labels`."""
    check_examples(examples, "the test data")
    if not examples:
        raise DataError("there are no examples to evaluate on; give at least one.")
    if labels is not None and (isinstance(labels, str) or not labels):
        raise DataError(f"labels must be a list of at least one text, not {labels!r}.")
    for i, example in enumerate(examples):
        if not isinstance(example.target, str):
            raise DataError(f"example {i} has a target of token ids; an evaluation compares texts.")
        if labels is not None and example.target not in labels:
            raise DataError(f"example {i} has the target {example.target!r}, which is not one of {', '.join(labels)}.")
    prompt.check_model(model)
    rendered = [render_query(model, prompt, e.query, where=f"example {i}") for i, e in enumerate(examples)]
    return rendered, None if labels is None else LabelChooser(model, prompt, examples, rendered, labels)


def shares(evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Accuracy]]:
    """{measure: {name of an evaluation: its share}}, for the measures that all of them have."""
    table = {name: {when: getattr(one, name) for when, one in evaluations.items()} for name in MEASURES}
    return {name: row for name, row in table.items() if all(row.values())}
