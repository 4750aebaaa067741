"""How well a prompt does on labelled examples: by what the model writes, and by which label it finds most likely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from embedgrad.errors import DataError
from embedgrad.example import Example
from embedgrad.generate import generate
from embedgrad.gradient import score
from embedgrad.model.model import Model
from embedgrad.prompt import SoftPrompt
from embedgrad.sampling import Sampling

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Accuracy:
    """A share of correct answers with its 95 % Wilson interval (Wilson 1927)."""

    value: float
    low: float
    high: float
    correct: int
    total: int

    @classmethod
    def of(cls, correct: Sequence[bool]) -> Accuracy:
        """The share of True."""
        n, k = len(correct), sum(correct)
        share, z = k / n, Z_95
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return cls(share, max(0.0, centre - half), min(1.0, centre + half), k, n)


@dataclass(frozen=True)
class Record:
    """One example: what was asked and expected, what the model wrote, and the label it finds most likely."""

    query: str | Sequence[int]
    target: str
    generated: str
    generated_correct: bool
    choice: str | None


@dataclass(frozen=True)
class Evaluation:
    """generated_accuracy: the answer written equals the target, but for case, surrounding white space and a final
    full stop. choice_accuracy (with labels): the label with the highest log-probability is the target."""

    generated_accuracy: Accuracy
    choice_accuracy: Accuracy | None
    records: list[Record]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return asdict(self)


def evaluate(
    model: Model,
    prompt: SoftPrompt,
    examples: Sequence[Example],
    labels: Sequence[str] | None = None,
    sampling: Sampling | None = None,
) -> Evaluation:
    """Generate an answer to every example; with `labels`, also ask which of them is most likely.

    sampling: default greedy, as many tokens as the longest target (and label) needs and eight more. Raises DataError
    (no examples, a target that is not text or not among the labels) and what `generate` and `score` raise.
    """
    if not examples:
        raise DataError("there are no examples to evaluate on; give at least one.")
    for i, example in enumerate(examples):
        if not isinstance(example.target, str):
            raise DataError(f"example {i} has a target of token ids; an evaluation compares texts.")
        if labels is not None and example.target not in labels:
            raise DataError(f"example {i} has the target {example.target!r}, which is not one of {', '.join(labels)}.")
    if sampling is None:
        texts = {str(example.target) for example in examples} | set(labels or ())
        sampling = Sampling(max_new_tokens=max(len(model.tokenizer.encode(text)) for text in texts) + 8)
    answers = generate(model, prompt, [example.query for example in examples], sampling)
    choices = [None] * len(examples) if labels is None else choose_labels(model, prompt, examples, labels)
    records = [
        Record(example.query, str(example.target), answer.text, same_answer(answer.text, str(example.target)), choice)
        for example, answer, choice in zip(examples, answers, choices, strict=True)
    ]
    return Evaluation(
        Accuracy.of([record.generated_correct for record in records]),
        None if labels is None else Accuracy.of([record.choice == record.target for record in records]),
        records,
    )


def same_answer(answer: str, target: str) -> bool:
    """Whether two answers are the same but for case, surrounding white space and a final full stop."""

    def plain(text: str) -> str:
        return text.strip().removesuffix(".").strip().casefold()

    return plain(answer) == plain(target)


def choose_labels(
    model: Model, prompt: SoftPrompt, examples: Sequence[Example], labels: Sequence[str]
) -> list[str]:
    """For each example the label with the highest log-probability of its tokens and of ending there."""
    if not labels:
        raise DataError("there are no labels to choose from; give at least one.")
    asked = [replace(example, target=label, weight=1.0) for example in examples for label in labels]
    likelihood = [-float(nll.double().sum()) for nll in score(model, prompt, asked).token_nll]
    rows = [likelihood[i : i + len(labels)] for i in range(0, len(likelihood), len(labels))]
    return [labels[max(range(len(labels)), key=row.__getitem__)] for row in rows]
