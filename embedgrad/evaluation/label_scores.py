"""Scores the possible labels of a query by their log-probabilities.

There are three scores:
- plain: the sum of the log-probabilities of the label's tokens and of the token that ends the answer.
- normalised: the mean of these log-probabilities, so that a label of more tokens has no disadvantage.
- calibrated: the plain score minus the plain score after a query without content, so that a label that the prompt
  always favours has no advantage (Zhao et al., "Calibrate Before Use", arXiv 2102.09690, with their diagonal matrix;
  the ranking is the same as by the domain-conditional PMI of Holtzman et al., arXiv 2104.08315).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from embedgrad.data.example import Example
from embedgrad.engine.gradient import check_finite
from embedgrad.engine.model import Model
from embedgrad.engine.scorer import score
from embedgrad.generation.kv_cache import KeyValueCache
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import Rendered, render

CONTENT_FREE = "N/A"


@dataclass(frozen=True)
class LikeliestLabels:
    """The label with the highest value of each score."""

    plain: str
    normalised: str
    calibrated: str


class LabelScorer:
    """Scores the labels of each query after its prefill, with one decoding step for each token that labels share.

    It is an `on_prefill` callback of `embedgrad.generation.generate.write_answers`. When that returns, `likeliest`
    gives the results.
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
            [
                render(model, prompt, replace(example, target=label), example.where).ids[len(query.ids) :]
                for label in labels
            ]
            for example, query in zip(examples, rendered, strict=True)
        ]

    def __call__(self, start: int, cache: KeyValueCache, logits: Tensor) -> None:
        """Scores B queries from index `start` on. They are in `cache`; `logits` [B, V] are for their next tokens."""
        queries = self._continuations[start : start + cache.batch]
        self._scores.append(self._log_likelihoods(cache, logits, queries).cpu())

    def likeliest(self) -> list[LikeliestLabels]:
        """The labels with the highest scores for each query, once all are scored. Of equal scores the first wins.

        Raises TrainingError or PromptError where a score is not finite.
        """
        plain = torch.cat(self._scores, dim=1)  # [labels, queries]
        check_finite(self._model, self._prompt, {"labels' likelihood": plain})
        lengths = torch.tensor([[len(ids) for ids in query] for query in self._continuations]).T
        calibrated = plain - self._prior()[:, None]
        chosen = [s.argmax(dim=0).tolist() for s in (plain, plain / lengths, calibrated)]
        return [LikeliestLabels(*(self.labels[i] for i in each)) for each in zip(*chosen, strict=True)]

    def _prior(self) -> Tensor:
        """The plain score of each label after a query without content, [labels] float64."""
        details = score(self._model, self._prompt, [Example(CONTENT_FREE, label) for label in self.labels])
        return torch.stack([-nll.double().sum().cpu() for nll in details.token_nll])

    def _log_likelihoods(self, cache: KeyValueCache, logits: Tensor, ids: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """Σ log p of the tokens ids[query][label], [labels, B] float64. First tokens that labels share are taken once.

        The labels are a trie, walked from the logits of the queries down. A branch is a token for each query, or −1
        where the label has ended there; a query whose label has ended is fed a token that counts for nothing.
        """
        device = self._model.device
        totals = torch.zeros(len(self.labels), len(ids), dtype=torch.float64, device=device)
        waiting: list[tuple[tuple[int, ...], list[int], int, Any]] = []

        def branch(labels: Sequence[int], depth: int, logits: Tensor) -> None:
            """Adds log p of the tokens at `depth`, and lets wait what follows them."""
            together: dict[tuple[int, ...], list[int]] = {}
            for label in labels:
                column = tuple(query[label][depth] if depth < len(query[label]) else -1 for query in ids)
                together.setdefault(column, []).append(label)
            wide = logits.double()
            log_p = wide - wide.logsumexp(dim=1, keepdim=True)
            for column, members in together.items():
                at = torch.tensor(column, device=device)
                found = log_p.gather(1, at.clamp_min(0)[:, None]).squeeze(1)
                totals[members] += torch.where(at >= 0, found, 0)
                longer = [n for n in members if any(len(query[n]) > depth + 1 for query in ids)]
                if longer:
                    waiting.append((column, longer, depth + 1, cache.mark()))

        begin = cache.mark()
        branch(range(len(self.labels)), 0, logits)
        while waiting:
            column, labels, depth, mark = waiting.pop()
            cache.rewind(mark)
            fed = torch.tensor(column, device=device).clamp_min(0)
            branch(labels, depth, cache.logits(cache.advance(fed)))
        cache.rewind(begin)
        return totals
