"""Which of some allowed answers a model finds most likely: by log-probability, not by what it writes.

Three ways to compare continuations, as they are in use: the sum of the log-probabilities of the label's tokens with the
end of the answer (`plain`); their mean, so that a label of more tokens is not at a disadvantage (`normalised`); and the
sum less that behind a query without content, so that a label the prompt favours anyway is not at an advantage
(`calibrated`: Zhao et al., "Calibrate Before Use", arXiv 2102.09690, with their diagonal matrix; the same ranking as
the domain-conditional PMI of Holtzman et al., arXiv 2104.08315).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embedgrad.example import Example
from embedgrad.gradient import score
from embedgrad.model.decoding import KeyValueCache
from embedgrad.model.model import Model
from embedgrad.prompt import SoftPrompt
from embedgrad.rendering import Rendered, render

CONTENT_FREE = "N/A"


@dataclass(frozen=True)
class Choice:
    """The label that each way of comparing takes."""

    plain: str
    normalised: str
    calibrated: str


class LabelChooser:
    """Scores each query's labels right after its prefill: one decoding step per token of a label.

    It is what `embedgrad.generation.write_answers` calls as `on_prefill`; afterwards `choices` has an entry per query.
    """

    def __init__(
        self,
        model: Model,
        prompt: SoftPrompt,
        examples: Sequence[Example],
        rendered: Sequence[Rendered],
        labels: Sequence[str],
    ) -> None:
        self.labels = list(labels)
        self._model, self._prompt = model, prompt
        self._scores: list[Tensor] = []  # [labels, B] each
        self._continuations = [
            [render(model, prompt, replace(example, target=label)).ids[len(context.ids) :] for label in labels]
            for example, context in zip(examples, rendered, strict=True)
        ]

    def __call__(self, start: int, cache: KeyValueCache, logits: Tensor) -> None:
        """Score the queries from `start` on, whose contexts are in `cache`, with next-token `logits` [B, V]."""
        queries = self._continuations[start : start + cache.batch]
        scores = [self._log_likelihood(cache, logits, [q[n] for q in queries]) for n in range(len(self.labels))]
        self._scores.append(torch.stack(scores).cpu())

    def choices(self) -> list[Choice]:
        """What the labels' scores say, once all queries are seen; ties go to the first label."""
        plain = torch.cat(self._scores, dim=1)  # [labels, queries]
        lengths = torch.tensor([[len(ids) for ids in query] for query in self._continuations]).T
        calibrated = plain - self._prior()[:, None]
        chosen = [s.argmax(dim=0).tolist() for s in (plain, plain / lengths, calibrated)]
        return [Choice(*(self.labels[i] for i in each)) for each in zip(*chosen, strict=True)]

    def _prior(self) -> Tensor:
        """Σ log p of each label behind a query without content, [labels] float64."""
        details = score(self._model, self._prompt, [Example(CONTENT_FREE, label) for label in self.labels])
        return torch.stack([-nll.double().sum().cpu() for nll in details.token_nll])

    def _log_likelihood(self, cache: KeyValueCache, logits: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
        """Σ log p of each query's tokens `ids`, [B] float64. Shorter ones are padded with tokens that do not count."""
        mark, device = cache.mark(), self._model.device
        total = torch.zeros(len(ids), dtype=torch.float64, device=device)
        longest = max(len(tokens) for tokens in ids)
        for t in range(longest):
            at = torch.tensor([tokens[min(t, len(tokens) - 1)] for tokens in ids], device=device)
            counts = torch.tensor([t < len(tokens) for tokens in ids], device=device)
            log_p = logits.double().log_softmax(dim=1).gather(1, at[:, None]).squeeze(1)
            total += torch.where(counts, log_p, 0)
            if t + 1 < longest:
                logits = cache.logits(cache.advance(at))
        cache.rewind(mark)
        return total
