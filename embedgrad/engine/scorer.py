"""The losses of examples under a prompt, forward only: once, or under one prompt after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from embedgrad.data.example import Example
from embedgrad.engine.gradient import Details, check_finite, details_of, rendered_batch
from embedgrad.engine.loss import target_loss
from embedgrad.engine.model import Model
from embedgrad.engine.packed_pass import PackedPass
from embedgrad.engine.runner import PassRunner
from embedgrad.engine.tree import PreparedSequence, build_tree, prepare
from embedgrad.prompt.prompt import SoftPrompt

SCORE_TOKENS = 4096  # tokens that a forward-only pass packs together


def score(model: Model, prompt: SoftPrompt, batch: Sequence[Example]) -> Details:
    """`Details` of a batch of any size, forward only.

    Raises what `loss_and_grad` raises.
    """
    details = Scorer(model, [prepare(rendered_batch(model, prompt, batch))]).details(prompt.embeddings, 0)
    check_finite(model, prompt, {"loss": details.example_loss})
    return details


class Scorer:
    """Scores the same chunks of sequences with one prompt after another."""

    def __init__(self, model: Model, chunks: Sequence[Sequence[PreparedSequence]], *, repeated: bool = False) -> None:
        """chunks: sequences that are scored at one call, at least one each. repeated: worth a CUDA graph on a GPU."""
        self._model = model
        self._embeddings = torch.empty(0)
        trees = [[build_tree(part) for part in _by_tokens(chunk)] for chunk in chunks]
        known = [tree for chunk in trees for tree in chunk] if repeated else []
        self._runner = PassRunner(model, self._launch, known, policy=None, static=None if repeated else False)
        self._prepared = [[self._runner.prepare(tree) for tree in chunk] for chunk in trees]

    def details(self, embeddings: Tensor, chunk: int) -> Details:
        """`Details` of a chunk with the prompt `embeddings` [k, d]."""
        if self._embeddings.shape != embeddings.shape:
            self._embeddings = torch.empty_like(embeddings, device=self._model.device)
        self._embeddings.copy_(embeddings)
        launched = [self._runner.launch(prepared) for prepared in self._prepared[chunk]]
        parts = []
        for each in launched:
            nll, correct = each.read().chunk(2)
            count = len(each.tree.target_ids)  # without those of the padding
            nll = nll[:count].to(self._model.decoder.sum_dtype)
            parts.append(details_of(each.tree, nll, correct[:count].bool(), len(each.tree.leaves)))
        return Details(
            torch.cat([part.example_loss for part in parts]),
            [nll for part in parts for nll in part.token_nll],
            torch.cat([part.exact for part in parts]),
        )

    def _launch(self, p: PackedPass, policy: str | None) -> Tensor:
        decoder = self._model.decoder
        hidden = decoder.forward(self._embeddings, p, policy)
        nll, predicted, _ = target_loss(decoder, self._model.weights.head, hidden, p.targets, differentiate=False)
        return torch.cat([nll.double(), (predicted == p.targets.ids).double()])


def _by_tokens(sequences: Sequence[PreparedSequence]) -> Iterator[list[PreparedSequence]]:
    part: list[PreparedSequence] = []
    tokens = 0
    for sequence in sequences:
        if part and tokens + sequence.length > SCORE_TOKENS:
            yield part
            part, tokens = [], 0
        part.append(sequence)
        tokens += sequence.length
    yield part
