"""The target's prompt: its own tokens of the same text, displaced as the source's were."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.engine.model import Model
from embedgrad.maths.trust_region import TrustRegion
from embedgrad.prompt.carry import carried
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.transfer.alignment import shares, spans
from embedgrad.transfer.shared import shared_tokens
from embedgrad.transfer.translators import Translator, fit

SHUFFLED = "shuffled"


@dataclass(frozen=True)
class Bridge:
    """Two models, and what was fitted on the tokens that they share. shared: how many these are.

    text: the prompt of the target that has no displacement.
    """

    source: Model
    prompt: SoftPrompt
    target: Model
    text: SoftPrompt
    shared: int
    translators: list[Translator]

    @classmethod
    def build(cls, source: Model, prompt: SoftPrompt, target: Model, names: list[str], seed: int = 0) -> Bridge:
        """Fits the translators `names`. Raises ConfigError, and what `SoftPrompt.from_text` raises for the target."""
        text = SoftPrompt.from_text(target, prompt.text, carried(target, prompt.template))
        pairs = shared_tokens(source.tokenizer, target.tokenizer)
        pairs = [(a, b) for a, b in pairs if a < len(source.weights.embedding) and b < len(target.weights.embedding)]
        ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
        fitted = fit(names, source.embedding_rows(ours), target.embedding_rows(theirs), seed)
        return cls(source, prompt, target, text, len(pairs), fitted)

    def carried(self, translator: Translator, region: TrustRegion) -> SoftPrompt:
        """The prompt displaced through `translator`, inside `region`."""
        return self._displaced(self.displacement(translator), region)

    def shuffled(self, translator: Translator, region: TrustRegion, seed: int) -> SoftPrompt:
        """The control: each row's displacement has the same length, and its numbers in a random order."""
        delta = self.displacement(translator)
        draw = torch.Generator().manual_seed(seed)
        mixed = torch.stack([row[torch.randperm(len(row), generator=draw)] for row in delta])
        return self._displaced(mixed, region)

    def displacement(self, translator: Translator) -> Tensor:
        """[k_t, d_t] float64: each target row's displacement, as long, relative to the row, as the source's.

        A target token that stands for several source tokens has the mean of theirs, weighted by characters; one that
        stands for a part of a source token has that token's.
        """
        prompt, text = self.prompt, self.text
        e0, f0 = prompt.anchor.double(), text.anchor.double()
        delta = prompt.embeddings.double() - e0
        weights = shares(
            spans(self.source.tokenizer, prompt.text, prompt.token_ids),
            spans(self.target.tokenizer, text.text, text.token_ids),
        )
        result = torch.zeros_like(f0)
        for row, source in weights.nonzero().tolist():
            moved = translator.translate(delta[source : source + 1], e0[source : source + 1], f0[row : row + 1])
            result[row] += weights[row, source] * moved[0]
        relative = delta.norm(dim=1) / e0.norm(dim=1).clamp_min(1e-30)
        wanted = (weights @ relative) * f0.norm(dim=1)
        return result * (wanted / result.norm(dim=1).clamp_min(1e-30))[:, None]

    def _displaced(self, delta: Tensor, region: TrustRegion) -> SoftPrompt:
        anchor = self.text.anchor
        inside = region.project((anchor.double() + delta).float(), anchor)
        return self.text.replace(embeddings=inside.to(self.text.embeddings.dtype))
