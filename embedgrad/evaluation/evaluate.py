"""Evaluates a prompt on examples: by the generated answers, and by the label with the highest score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from embedgrad.data.example import Example, check_examples
from embedgrad.distributed.ranks import ALONE, Ranks, parts_of
from embedgrad.engine.model import Model
from embedgrad.evaluation.answers import AnswerStatistics
from embedgrad.evaluation.grading.grader import Grade, Grader
from embedgrad.evaluation.grading.labels import Exact, same_answer
from embedgrad.evaluation.label_scores import LabelScorer, LikeliestLabels
from embedgrad.evaluation.statistics import Accuracy, McNemar
from embedgrad.evaluation.targets import check_targets
from embedgrad.generation.generate import Generation, check_room, write_answers
from embedgrad.generation.sampling import Sampling
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import Rendered, render_query
from embedgrad.util.errors import DataError

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
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Generates an answer to every example and grades it. With `labels`, also finds the most likely label.

    labels: all possible answers, or None.
    sampling: None: greedy, with 8 tokens more than the longest target or label has.
    grader: None: `embedgrad.evaluation.grading.labels.Exact`, which ignores case, surrounding white space and a final
        full stop.
    ranks: processes that share the examples; all call this with the same arguments and get the same result.
    Raises DataError where there are no examples, or a target is not text, not among the labels, or not right by the
    grader when it is the answer, and the errors of `generate`.
    """
    grader = Exact(tuple(labels or ())) if grader is None else grader
    named, rendered = _rendered(model, prompt, examples, labels, grader)
    sampling = default_sampling(model, examples, labels) if sampling is None else sampling

    def answer(own: range) -> list[tuple[Generation, LikeliestLabels | None]]:
        part = slice(own.start, own.stop)
        scorer = None if labels is None else LabelScorer(model, prompt, named[part], rendered[part], labels)
        answers = write_answers(model, prompt, rendered[part], sampling, on_prefill=scorer, first_stream=own.start)
        return list(zip(answers, [None] * len(answers) if scorer is None else scorer.likeliest(), strict=True))

    answered = answer(range(len(examples))) if ranks.size == 1 else _shared(len(examples), ranks, answer)
    answers = [one for one, _ in answered]
    targets = [str(example.target) for example in examples]
    grades = [grader.grade(answer.text, target) for answer, target in zip(answers, targets, strict=True)]
    records = [_record(*each) for each in zip(examples, answers, grades, strict=True)]
    if labels is not None:
        records = [
            replace(r, choice=best.plain, choice_normalised=best.normalised, choice_calibrated=best.calibrated)
            for r, (_, best) in zip(records, answered, strict=True)
            if best is not None
        ]

    def share(name: str) -> Accuracy | None:
        return None if labels is None else Accuracy.of([getattr(r, name) == r.target for r in records])

    return Evaluation(
        Accuracy.of([record.generated_correct for record in records]),
        share("choice"),
        records,
        share("choice_normalised"),
        share("choice_calibrated"),
        grader.describe(),
        AnswerStatistics.of(answers, targets, grades, grader),
    )


def _shared(
    count: int, ranks: Ranks, answer: Callable[[range], list[tuple[Generation, LikeliestLabels | None]]]
) -> list[tuple[Generation, LikeliestLabels | None]]:
    """What `answer` gives for `count` examples, of which each rank does a run of neighbours."""
    own = parts_of(count, ranks)[ranks.rank]
    told = ranks.gather([[asdict(one), best and asdict(best)] for one, best in (answer(own) if own else ())])
    return [(Generation(**one), best and LikeliestLabels(**best)) for part in told for one, best in part]


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
    model: Model,
    prompt: SoftPrompt,
    examples: Sequence[Example],
    labels: Sequence[str] | None = None,
    grader: Grader | None = None,
) -> None:
    """Raises the errors that `evaluate` would raise for these examples before it computes anything."""
    named, rendered = _rendered(model, prompt, examples, labels, grader)
    if labels is not None:
        LabelScorer(model, prompt, named, rendered, labels)


def _rendered(
    model: Model,
    prompt: SoftPrompt,
    examples: Sequence[Example],
    labels: Sequence[str] | None,
    grader: Grader | None,
) -> tuple[list[Example], list[Rendered]]:
    """(the examples, each with a name for messages, and their rendered queries)."""
    check_examples(examples, "the test data")
    if not examples:
        raise DataError("there are no examples to evaluate on; give at least one.")
    examples = [e if e.where else replace(e, where=f"example {i}") for i, e in enumerate(examples)]
    for example in examples:
        if not isinstance(example.target, str):
            raise DataError(f"{example.where} has a target of token ids; an evaluation compares texts.")
    check_targets(examples, "example", labels, grader)
    prompt.check_model(model)
    rendered = [render_query(model, prompt, example.query, where=example.where) for example in examples]
    check_room(model, rendered, [example.where for example in examples])
    return examples, rendered


def shares(evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Accuracy]]:
    """{measure: {name of the evaluation: accuracy}}, for the measures that all evaluations have."""
    table = {name: {when: getattr(one, name) for when, one in evaluations.items()} for name in MEASURES}
    return {name: accuracies for name, accuracies in table.items() if all(accuracies.values())}
