"""A prompt's steps on several processes: each computes its part of the batch's gradient, and all take the same step.

With the weights w of the examples, W_r their sum over the part of rank r and W over the batch, the gradient of the
batch's weighted mean is

    g = Σ_r (W_r / W) g_r        g_r: the gradient of the part's own weighted mean

summed in float64 in the order of the ranks. Every rank gathers all g_r and makes the same sum, so that all end with the
same bits. On a GPU a graph holds the pass of a part; gathering and the prompt's step follow it on the same stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embedgrad.distributed.ranks import Ranks
from embedgrad.engine.batch_split import split_batch
from embedgrad.engine.gradient import launch_gradient, loss_of
from embedgrad.engine.model import Model
from embedgrad.engine.packed_pass import PackedPass
from embedgrad.engine.prompt_trainer import Batch, PromptTrainer, StepResult
from embedgrad.engine.runner import Launched, Prepared
from embedgrad.engine.tree import TokenTree
from embedgrad.maths.optimizer import StepReport

_NOTHING = torch.empty(0, dtype=torch.int64)
_NO_TREE = TokenTree.without_targets(_NOTHING, _NOTHING, _NOTHING, _NOTHING, (), _NOTHING)


@dataclass(frozen=True)
class Part:
    """A step that is ready to be launched. members: for each rank its examples of the batch. shares: W_r / W. own: this
    rank's pass, None where its part is empty."""

    members: list[list[int]]
    shares: list[float]
    own: Prepared | None


@dataclass(frozen=True)
class OnItsWay:
    """A step that was launched: this rank's own numbers, and what the step did."""

    part: Part
    own: Launched | None
    step: Launched


class RankedTrainer(PromptTrainer):
    """`PromptTrainer` for this process among `ranks`. All ranks make the same calls with the same batches."""

    def __init__(
        self, model: Model, state: tuple[Tensor, Tensor, Tensor], anchor: Tensor, batches: Iterable[Batch], *,
        ranks: Ranks, **settings: Any,
    ) -> None:  # fmt: skip
        """See `PromptTrainer`."""
        self._ranks = ranks
        shape, kind = state[0].shape, model.decoder.sum_dtype
        # The gradient, and the loss behind it: in one place, which a captured pass knows.
        self._sent = torch.zeros(shape.numel() + 1, dtype=kind, device=model.device)
        own = (part for batch in batches if (part := self._own(batch)[2]) is not None)
        super().__init__(model, state, anchor, own, **settings)
        ranks.gather_tensors(self._sent)  # connects the GPUs now and not while a graph is captured

    def _own(self, batch: Batch) -> tuple[list[list[int]], list[float], Batch | None]:
        """(the ranks' examples, their shares of the weights, this rank's part of the batch)."""
        sequences, weights = batch
        members = split_batch(sequences, self._ranks.size)
        total = sum(weights)
        shares = [sum(weights[i] for i in part) / total for part in members]
        mine = members[self._ranks.rank]
        return members, shares, ([sequences[i] for i in mine], [weights[i] for i in mine]) if mine else None

    def prepare(self, batch: Batch) -> Part:  # type: ignore[override]
        """See `PromptTrainer`."""
        members, shares, own = self._own(batch)
        return Part(members, shares, None if own is None else super().prepare(own))

    def launch(self, prepared: Part, step: int, lr: float) -> OnItsWay:  # type: ignore[override]
        """See `PromptTrainer`."""
        if prepared.own is None:
            own = None
            self._set_factors(step, lr)
            self._sent.zero_()
        else:
            own = super().launch(prepared.own, step, lr)
        return OnItsWay(prepared, own, Launched(_NO_TREE, self._move(prepared.shares)))

    def read(self, launched: OnItsWay) -> StepResult:  # type: ignore[override]
        """See `PromptTrainer`."""
        members, k = launched.part.members, self._anchor.shape[0]
        said = torch.zeros(1 + max(map(len, members)), dtype=torch.float64)  # the loss, and who was not exact
        if launched.own is not None:
            tree = launched.own.tree
            nll, correct = launched.own.read().chunk(2)
            count = len(tree.target_ids)  # without those of the padding
            said[0] = loss_of(tree, nll[:count])
            said[1 + tree.target_example[correct[:count] == 0]] = 1
        said_by = self._ranks.gather_tensors(said)
        exact = torch.ones(sum(map(len, members)), dtype=torch.bool)
        for row, part in zip(said_by, members, strict=True):
            exact[part] = row[1 : 1 + len(part)] == 0
        loss = sum(share * float(row[0]) for share, row in zip(launched.part.shares, said_by, strict=True))
        similarity, ratio, projected, norm, alive = launched.step.read().split((k, k, k, 1, 1))
        report = StepReport(similarity, ratio, projected.bool(), norm.squeeze(), alive.bool().squeeze())
        return StepResult(loss, exact, report)

    def _launch(self, p: PackedPass, policy: str | None) -> Tensor:
        nll, predicted, grad = launch_gradient(self._model, self._state[0], p, policy)
        self._sent[:-1].copy_(grad.flatten())
        self._sent[-1:].copy_((nll * p.targets.weights).sum().reshape(1))
        return torch.cat([nll.double(), (predicted == p.targets.ids).double()])

    def _move(self, shares: Sequence[float]) -> Tensor:
        """The sum of what all ranks found, and the step that it makes: its report as numbers on the device."""
        rows = self._ranks.gather_tensors(self._sent)
        total = torch.zeros_like(rows[0], dtype=torch.float64)
        for row, share in zip(rows, shares, strict=True):
            if share:
                total += row.double() * share
        e, m, v = self._state
        self._alive &= torch.isfinite(total[-1])
        report = self._model.ops.prompt_step(
            e, self._anchor, m, v, total[:-1].to(e.dtype).view_as(e), factors=self._factors, region=self._region,
            rule=self._rule, clip_norm=self._clip_norm, alive=self._alive, before=self._before,
        )  # fmt: skip
        numbers = (
            report.similarity, report.norm_ratio, report.projected, report.gradient_norm[None], report.alive[None]
        )  # fmt: skip
        return torch.cat([x.double() for x in numbers])
