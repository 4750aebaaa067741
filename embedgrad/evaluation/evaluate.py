"""Evaluates a prompt on examples: by the generated answers, and by the label with the highest score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from embedgrad.data.example import Example, check_examples
from embedgrad.engine.model import Model
from embedgrad.evaluation.answers import AnswerStatistics
from embedgrad.evaluation.grading.grader import Grade, Grader
from embedgrad.evaluation.grading.labels import Exact, same_answer
from embedgrad.evaluation.label_scores import LabelScorer
from embedgrad.evaluation.statistics import Accuracy, McNemar
from embedgrad.generation.generate import Generation, check_room, write_answers
from embedgrad.generation.sampling import Sampling
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import Rendered, render_query
from embedgrad.util.errors import DataError
from embedgrad.util.shown import LONGEST, cut, short

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
_SPARE = 8  # tokens by which an answer may be longer than the longest target


@dataclass(frozen=True)
class Record:
    """The result for one example.

    query, target: the example. generated: the answer that the model wrote. generated_correct, answer: the grader's
    verdict, and the answer that it read (None: an invalid one). choice, choice_normalised, choice_calibrated: the
    labels with the highest scores (`embedgrad.evaluation.label_scores`); None without labels. stop_reason, tokens: why
    the answer ended, and its length in tokens.
    """

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
    """The result of an evaluation.

    generated_accuracy: share of generated answers that the grader finds right.
    choice_accuracy, choice_normalised_accuracy, choice_calibrated_accuracy: share of examples whose target is the label
        with the highest score, for each way of scoring; None without labels.
    records: one per example, in order.
    grader: the grader as JSON-able values.
    statistics: statistics of the answers, such as the shares of invalid and of truncated ones.
    """

    generated_accuracy: Accuracy
    choice_accuracy: Accuracy | None
    records: list[Record]
    choice_normalised_accuracy: Accuracy | None
    choice_calibrated_accuracy: Accuracy | None
    grader: dict[str, Any]
    statistics: AnswerStatistics

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return {**asdict(self), "statistics": self.statistics.to_dict()}

    def correct(self, measure: str) -> list[bool]:
        """For each record whether it is right by `measure`, a key of MEASURES."""
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
    """Generates an answer to every example and grades it. With `labels`, also finds the most likely label.

    labels: all possible answers, or None.
    sampling: None: greedy, with 8 tokens more than the longest target or label has.
    grader: None: `embedgrad.evaluation.grading.labels.Exact`, which ignores case, surrounding white space and a final
        full stop.
    Raises DataError where there are no examples, or a target is not text or not among the labels, and the errors of
    `generate`.
    """
    rendered, scorer = _prepared(model, prompt, examples, labels)
    grader = Exact(tuple(labels or ())) if grader is None else grader
    sampling = default_sampling(model, examples, labels) if sampling is None else sampling
    answers = write_answers(model, prompt, rendered, sampling, on_prefill=scorer)
    targets = [str(example.target) for example in examples]
    grades = [grader.grade(answer.text, target) for answer, target in zip(answers, targets, strict=True)]
    records = [_record(*each) for each in zip(examples, answers, grades, strict=True)]
    if scorer is not None:
        likeliest = zip(records, scorer.likeliest(), strict=True)
        records = [
            replace(r, choice=best.plain, choice_normalised=best.normalised, choice_calibrated=best.calibrated)
            for r, best in likeliest
        ]

    def share(name: str) -> Accuracy | None:
        return None if scorer is None else Accuracy.of([getattr(r, name) == r.target for r in records])

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
    """McNemar's exact test for each measure that both evaluations have. Both have the same examples in the same
    order."""
    return {
        name: McNemar.of(before.correct(name), after.correct(name))
        for name in MEASURES
        if getattr(before, name) is not None and getattr(after, name) is not None
    }


def default_sampling(model: Model, examples: Sequence[Example], labels: Sequence[str] | None = None) -> Sampling:
    """Greedy sampling with 8 tokens more than the longest target or label has."""
    lengths = [len(example.target) for example in examples if not isinstance(example.target, str)]
    texts = {example.target for example in examples if isinstance(example.target, str)} | set(labels or ())
    lengths += [len(model.tokenizer.encode(text)) for text in texts]
    return Sampling(max_new_tokens=max(lengths) + _SPARE)


def check_evaluation(
    model: Model, prompt: SoftPrompt, examples: Sequence[Example], labels: Sequence[str] | None = None
) -> None:
    """Raises the errors that `evaluate` would raise for these examples before it computes anything."""
    rendered, _ = _prepared(model, prompt, examples, labels)
    check_room(model, rendered)


def _prepared(
    model: Model, prompt: SoftPrompt, examples: Sequence[Example], labels: Sequence[str] | None
) -> tuple[list[Rendered], LabelScorer | None]:
    """(the rendered queries, the scorer of `labels` or None)."""
    check_examples(examples, "the test data")
    if not examples:
        raise DataError("there are no examples to evaluate on; give at least one.")
    if labels is not None and (isinstance(labels, str) or not labels):
        raise DataError(f"labels must be a list of at least one text, not {short(labels)}.")
    for i, example in enumerate(examples):
        if not isinstance(example.target, str):
            raise DataError(f"example {i} has a target of token ids; an evaluation compares texts.")
        if labels is not None and example.target not in labels:
            known = cut(', '.join(labels), LONGEST)
            raise DataError(f"example {i} has the target {short(example.target)}, which is not one of {known}.")
    prompt.check_model(model)
    rendered = [render_query(model, prompt, e.query, where=f"example {i}") for i, e in enumerate(examples)]
    return rendered, None if labels is None else LabelScorer(model, prompt, examples, rendered, labels)


def shares(evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Accuracy]]:
    """{measure: {name of the evaluation: accuracy}}, for the measures that all evaluations have."""
    table = {name: {when: getattr(one, name) for when, one in evaluations.items()} for name in MEASURES}
    return {name: accuracies for name, accuracies in table.items() if all(accuracies.values())}
