"""The loss of prompts that are token ids, with and without a fluency term, and its gradient at the embeddings.

    L(ids) = mean over the examples of the mean nll of their targets  +  fluency · nll(ids)

nll(ids) is the mean negative log-likelihood (nats per token) that the model gives the prompt's tokens as a text of its
own: behind the BOS token, or behind the end-of-text token where there is no BOS. Where there is neither, the first
token is not counted.

A token that is passed forward costs 1, and 1 more where it is passed backward: with frozen weights the backward pass
costs about as much as the forward pass. Every sequence counts in full, as if no prefix were shared, so that the cost of
a search does not depend on how it is packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embedgrad.data.example import Example
from embedgrad.distributed.ranks import ALONE, Ranks, parts_of
from embedgrad.engine.batch_split import split_batch
from embedgrad.engine.gradient import check_finite, launch_gradient, loss_of, pass_over
from embedgrad.engine.model import Model
from embedgrad.engine.scorer import Scorer
from embedgrad.engine.tree import PreparedSequence, build_tree
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import Rendered, render
from embedgrad.util.errors import PromptError
from embedgrad.util.host import send

Ids = Sequence[int]


@dataclass(frozen=True)
class Losses:
    """For each of n candidates the mean loss on the examples and its nll as a text (0 without fluency), [n] float64."""

    task: Tensor
    nll: Tensor


class Objective:
    """The loss of prompts with as many tokens as `prompt` has, in its template."""

    def __init__(
        self, model: Model, prompt: SoftPrompt, examples: Sequence[Example], fluency: float = 0.0,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        """examples: those that batches are drawn from; they are rendered once. fluency: weight of the nll, at least 0.
        ranks: processes that share candidates and gradients; all make the same calls and get the same numbers.

        Raises what `render` raises.
        """
        self.model, self.prompt, self.fluency, self.ranks = model, prompt, fluency, ranks
        self._frames = [render(model, prompt, e, e.where or f"example {i}") for i, e in enumerate(examples, 1)]
        self._weights = [example.weight for example in examples]
        self.text_frame = alone(model, prompt.token_ids)

    def tokens(self, batch: Sequence[int]) -> int:
        """Tokens of one forward pass of one candidate over the examples with these indices."""
        return sum(len(self._frames[i].ids) for i in batch) + (len(self.text_frame.ids) if self.fluency else 0)

    def losses(self, candidates: Sequence[Ids], batch: Sequence[int]) -> Losses:
        """The losses of all candidates, in one packed pass (of pieces of at most `SCORE_TOKENS` tokens).

        The candidates' tokens are the rows of one pool of embeddings; sequences share what they begin with. Several
        ranks have a pass each, over their share of the candidates.
        """
        own = parts_of(len(candidates), self.ranks)[self.ranks.rank]
        scored = self._scored(candidates[own.start : own.stop], batch) if own else []
        found = [each for part in self.ranks.gather(scored) for each in part]
        task, nll = torch.tensor(found, dtype=torch.float64).view(-1, 2).T
        return Losses(task, nll)

    def _scored(self, candidates: Sequence[Ids], batch: Sequence[int]) -> list[list[float]]:
        """For each candidate its mean loss on the examples and its nll as a text."""
        pool, rows = _pooled(candidates)
        frames = [self._frames[i] for i in batch]
        sequences = [_shown(frame, ids, rows) for ids in candidates for frame in frames]
        prepared = [PreparedSequence(sequence) for sequence in sequences]
        if self.fluency:
            texts = [_shown(self.text_frame, ids, rows) for ids in candidates]
            prepared += [PreparedSequence(text, keep=False) for text in texts]
        with self.model.lock:
            found = Scorer(self.model, [prepared]).details(self._embeddings(pool), 0).example_loss.double().cpu()
        check_finite(self.model, self.prompt, {"loss": found})
        on_examples = found[: len(sequences)].view(len(candidates), len(frames))
        weights = torch.tensor([self._weights[i] for i in batch], dtype=torch.float64)
        nll = found[len(sequences) :] if self.fluency else torch.zeros(len(candidates), dtype=torch.float64)
        return torch.stack([on_examples @ (weights / weights.sum()), nll], dim=1).tolist()

    def gradient(self, ids: Ids, batch: Sequence[int]) -> tuple[float, Tensor]:
        """L and its gradient [k, d] at the embeddings of the prompt's places, each as its own row, where they show
        `ids`. The nll's gradient is that of the tokens as context; `next_token_rows` has that of the tokens as targets.
        """
        places = list(range(len(ids)))
        frames = [self._frames[i] for i in batch]
        prepared = [PreparedSequence(_placed(frame, ids, places)) for frame in frames]
        weights = [self._weights[i] for i in batch]
        total = sum(weights)
        weights = [weight / total for weight in weights]
        if self.fluency:
            prepared.append(PreparedSequence(_placed(self.text_frame, ids, places), keep=False))
            weights.append(self.fluency)
        if self.ranks.size == 1:
            return self._gradient(ids, prepared, weights)
        own = split_batch(prepared, self.ranks.size)[self.ranks.rank]
        part = torch.zeros(len(ids) * self.prompt.embeddings.shape[1] + 1, dtype=torch.float64)
        if own:
            loss, grad = self._gradient(ids, [prepared[i] for i in own], [weights[i] for i in own])
            part[0], part[1:] = loss, grad.flatten()
        found = torch.zeros_like(part)
        for row in self.ranks.gather_tensors(part):  # in the order of the ranks, so that all have the same bits
            found += row
        return float(found[0]), found[1:].view(len(ids), -1)

    def _gradient(
        self, ids: Ids, prepared: Sequence[PreparedSequence], weights: Sequence[float]
    ) -> tuple[float, Tensor]:
        """The weighted sum of these sequences' losses, and its gradient."""
        tree = build_tree(prepared, weights)
        model, scale = self.model, sum(weights)
        with model.lock:
            p = pass_over(model, tree)
            policy, nbytes = model.plan_memory([p.size], "auto")
            model.arena.begin(nbytes)
            nll, _, grad = launch_gradient(model, send(self._embeddings(ids), model.device), p, policy)
            nll, grad = nll.cpu(), grad.cpu()
        check_finite(model, self.prompt, {"loss": nll, "gradient": grad})
        return scale * loss_of(tree, nll), scale * grad

    def next_token_rows(self, ids: Ids) -> Tensor:
        """For each place the final-normed hidden state [k, d] that predicts its token in the text alone; zeros for a
        first token that is not counted. Its product with a row of the head is that token's logit."""
        tree = build_tree([PreparedSequence(_placed(self.text_frame, ids, list(range(len(ids)))), keep=False)])
        with self.model.lock:
            p = pass_over(self.model, tree)
            _, nbytes = self.model.plan_memory([p.size], None)
            self.model.arena.begin(nbytes)
            embeddings = send(self._embeddings(ids), self.model.device)
            hidden = self.model.decoder.forward(embeddings, p, None).clone()
        missing = hidden.new_zeros(len(ids) - len(hidden), hidden.shape[1])
        return torch.cat([missing, hidden])

    def _embeddings(self, ids: Ids) -> Tensor:
        rows = self.model.embedding_rows(list(ids))
        return rows.double() if self.model.dtype == torch.float64 else rows


def alone(model: Model, ids: Ids) -> Rendered:
    """`ids` as a text by itself whose tokens are all targets, behind the token that begins a text."""
    tokenizer = model.tokenizer
    first = tokenizer.bos_id if tokenizer.bos_id is not None else min(tokenizer.eos_ids, default=None)
    start = [] if first is None else [first]
    counted = [True] * len(ids) if start else [False] + [True] * (len(ids) - 1)
    rows = [-1] * len(start) + list(range(len(ids)))
    return Rendered([*start, *ids], rows, [False] * len(start) + counted, 0)


def text_nll(model: Model, text: str) -> float | None:
    """The mean negative log-likelihood (nats per token) of a text by itself; None for one token without a beginning."""
    sequence = alone(model, model.tokenizer.encode(text))
    if not any(sequence.target_mask):
        return None
    prepared = PreparedSequence(replace(sequence, prompt_rows=[-1] * len(sequence.ids)), keep=False)
    embeddings = model.embedding_rows([0])
    if model.dtype == torch.float64:
        embeddings = embeddings.double()
    with model.lock:
        return float(Scorer(model, [[prepared]]).details(embeddings, 0).example_loss[0])


def _pooled(candidates: Sequence[Ids]) -> tuple[list[int], dict[int, int]]:
    """(the distinct tokens of all candidates, {token: its row in the pool})."""
    pool = list(dict.fromkeys(id for ids in candidates for id in ids))
    return pool, {id: row for row, id in enumerate(pool)}


def _shown(frame: Rendered, ids: Ids, rows: dict[int, int]) -> Rendered:
    return _placed(frame, ids, [rows[id] for id in ids])


def _placed(frame: Rendered, ids: Ids, rows: Sequence[int]) -> Rendered:
    """`frame` with other tokens where it shows the prompt; its place i shows the row rows[i]."""
    count = max(frame.prompt_rows) + 1
    if len(ids) != count:
        raise PromptError(f"a candidate has {len(ids)} tokens, but the prompt that it takes the place of has {count}.")
    at = frame.prompt_rows
    return replace(
        frame,
        ids=[id if row < 0 else ids[row] for id, row in zip(frame.ids, at, strict=True)],
        prompt_rows=[row if row < 0 else rows[row] for row in at],
    )
