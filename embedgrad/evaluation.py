"""How well a prompt does on labelled examples: by what the model writes, and by which label it finds most likely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from embedgrad.errors import DataError
from embedgrad.example import Example, check_examples
from embedgrad.generation import check_room, write_answers
from embedgrad.model.decoding import KeyValueCache
from embedgrad.model.model import Model
from embedgrad.prompt import SoftPrompt
from embedgrad.rendering import Rendered, render, render_query
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
    full stop. choice_accuracy (with labels): the label whose tokens, with the
    end of the answer, have the highest log-probability is the target."""

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
    (no examples, a target that is not text or not among the labels) and what `generate` raises.
    """
    rendered, chooser = _prepared(model, prompt, examples, labels)
    if sampling is None:
        texts = {str(example.target) for example in examples} | set(labels or ())
        sampling = Sampling(max_new_tokens=max(len(model.tokenizer.encode(text)) for text in texts) + 8)
    answers = write_answers(model, prompt, rendered, sampling, on_prefill=chooser)
    choices = [None] * len(examples) if chooser is None else chooser.choices
    records = [
        Record(example.query, str(example.target), answer.text, same_answer(answer.text, str(example.target)), choice)
        for example, answer, choice in zip(examples, answers, choices, strict=True)
    ]
    return Evaluation(
        Accuracy.of([record.generated_correct for record in records]),
        None if labels is None else Accuracy.of([record.choice == record.target for record in records]),
        records,
    )


def check_evaluation(
    model: Model, prompt: SoftPrompt, examples: Sequence[Example], labels: Sequence[str] | None = None
) -> None:
    """Raises what `evaluate` would refuse these examples with, without computing anything."""
    rendered, _ = _prepared(model, prompt, examples, labels)
    check_room(model, rendered)


def _prepared(
    model: Model, prompt: SoftPrompt, examples: Sequence[Example], labels: Sequence[str] | None
) -> tuple[list[Rendered], _LabelChooser | None]:
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
    return rendered, None if labels is None else _LabelChooser(model, prompt, examples, rendered, labels)


def same_answer(answer: str, target: str) -> bool:
    """Whether two answers are the same but for case, surrounding white space and a final full stop."""

    def plain(text: str) -> str:
        return text.strip().removesuffix(".").strip().casefold()

    return plain(answer) == plain(target)


class _LabelChooser:
    """Finds each query's most likely label right after its prefill: one decoding step per token of a label."""

    def __init__(
        self,
        model: Model,
        prompt: SoftPrompt,
        examples: Sequence[Example],
        rendered: Sequence[Rendered],
        labels: Sequence[str],
    ) -> None:
        self.labels = labels
        self.choices: list[str] = []
        self._device = model.device
        self._continuations = [
            [render(model, prompt, replace(example, target=label)).ids[len(context.ids) :] for label in labels]
            for example, context in zip(examples, rendered, strict=True)
        ]

    def __call__(self, start: int, cache: KeyValueCache, logits: Tensor) -> None:
        """Choose for the queries from `start` on, whose contexts are in `cache`, with next-token `logits` [B, V]."""
        queries = self._continuations[start : start + cache.batch]
        scores = [self._log_likelihood(cache, logits, [q[n] for q in queries]) for n in range(len(self.labels))]
        self.choices += [self.labels[i] for i in torch.stack(scores).argmax(dim=0).tolist()]

    def _log_likelihood(self, cache: KeyValueCache, logits: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
        """Σ log p of each query's tokens `ids`, [B] float64. Shorter ones are padded with tokens that do not count."""
        mark = cache.mark()
        total = torch.zeros(len(ids), dtype=torch.float64, device=self._device)
        longest = max(len(tokens) for tokens in ids)
        for t in range(longest):
            at = torch.tensor([tokens[min(t, len(tokens) - 1)] for tokens in ids], device=self._device)
            counts = torch.tensor([t < len(tokens) for tokens in ids], device=self._device)
            log_p = logits.double().log_softmax(dim=1).gather(1, at[:, None]).squeeze(1)
            total += torch.where(counts, log_p, 0)
            if t + 1 < longest:
                logits = cache.logits(cache.advance(at))
        cache.rewind(mark)
        return total
