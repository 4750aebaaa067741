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
    """Scores the labels of each query after its prefill, with one decoding step per token of a label.

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
            [render(model, prompt, replace(example, target=label)).ids[len(query.ids) :] for label in labels]
            for example, query in zip(examples, rendered, strict=True)
        ]

    def __call__(self, start: int, cache: KeyValueCache, logits: Tensor) -> None:
        """Scores B queries from index `start` on. They are in `cache`; `logits` [B, V] are for their next tokens."""
        queries = self._continuations[start : start + cache.batch]
        scores = [self._log_likelihood(cache, logits, [q[n] for q in queries]) for n in range(len(self.labels))]
        self._scores.append(torch.stack(scores).cpu())

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

    def _log_likelihood(self, cache: KeyValueCache, logits: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
        """Σ log p of the tokens `ids` of each query, [B] float64. Shorter ones are padded; padding adds nothing."""
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
