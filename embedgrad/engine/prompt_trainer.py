"""The prompt's state on the model's device, and its optimiser steps.

A step is prepared on the host, launched, and read later: nothing between launching and reading waits for the device, so
that the next step can be prepared and launched while the device works. What is read is one vector of numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.engine.gradient import launch_gradient, loss_of
from embedgrad.engine.model import Model
from embedgrad.engine.packed_pass import PackedPass
from embedgrad.engine.runner import Capture, Launched, PassRunner, Prepared
from embedgrad.engine.tree import PreparedSequence, build_tree
from embedgrad.maths.optimizer import Rule, StepReport
from embedgrad.maths.trust_region import TrustRegion

Batch = tuple[Sequence[PreparedSequence], Sequence[float]]
"""Sequences and their weights."""


@dataclass(frozen=True)
class StepResult:
    """What one step came to, on the CPU.

    loss: of the batch (nats), before the step. exact [B] bool: every target of the example was the arg-max. report:
    what the step did to the prompt; where it is not alive, the step was refused and the state is that before it.
    """

    loss: float
    exact: Tensor
    report: StepReport


class PromptTrainer:
    """Prompt and moments [k, d] where the model is, in the prompt's type.

    ahead: how many steps may be launched before the first of them is read. At most one: `take_back` knows one.
    """

    def __init__(
        self,
        model: Model,
        state: tuple[Tensor, Tensor, Tensor],
        anchor: Tensor,
        batches: Iterable[Batch],
        *,
        region: TrustRegion,
        rule: Rule,
        clip_norm: float | None,
        policy: str,
        memory_budget: int | None,
        capture: Capture | None = None,
        static: bool | None = None,
    ) -> None:
        """state: e, m and v. batches: batches of the run, for the sizes of its passes; read only where passes are
        static. capture, static: see `PassRunner`. The other settings are those of `OptimizeConfig`."""
        device = model.device
        self._model, self._region, self._rule, self._clip_norm = model, region, rule, clip_norm
        self._anchor = anchor.to(device)
        self._state = torch.stack(state).to(device)
        self._before = torch.empty_like(self._state)
        self._alive = torch.ones((), dtype=torch.bool, device=device)
        self._factors = torch.empty(3, dtype=torch.float64, device=device)
        if static is None:
            static = capture is not None or device.type == "cuda"
        trees = [build_tree(*batch) for batch in batches] if static else []
        self._runner = PassRunner(
            model, self._launch, trees, policy=policy, memory_budget=memory_budget, capture=capture, static=static
        )
        self.ahead = 1 if device.type == "cuda" else 0

    def state(self, before_last: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """e, m and v after all steps that were launched, or before the last of them, copied to the CPU."""
        e, m, v = (self._before if before_last else self._state).to("cpu", copy=True)
        return e, m, v

    def take_back(self) -> None:
        """Undo the last step that was launched; once."""
        self._state.copy_(self._before)

    def prepare(self, batch: Batch) -> Prepared:
        """All of a step on `batch` that the host can do early."""
        return self._runner.prepare(build_tree(*batch))

    def launch(self, prepared: Prepared, step: int, lr: float) -> Launched:
        """Start a step; `step` counts from 1. Raises ConfigError where the memory budget is too small."""
        self._set_factors(step, lr)
        return self._runner.launch(prepared)

    def _set_factors(self, step: int, lr: float) -> None:
        factors = self._rule.factors(step, lr)
        if self._factors.is_cuda:
            factors = factors.pin_memory()
        self._factors.copy_(factors, non_blocking=True)

    def read(self, launched: Launched) -> StepResult:
        """Waits for the step."""
        tree, (k, _) = launched.tree, self._anchor.shape
        numbers, count = launched.read(), len(tree.target_ids)
        targets = (len(numbers) - 3 * k - 2) // 2  # with those of the padding
        nll, correct, similarity, ratio, projected, norm, alive = numbers.split((targets, targets, k, k, k, 1, 1))
        exact = torch.ones(len(tree.leaves), dtype=torch.bool)
        exact[tree.target_example[correct[:count] == 0]] = False
        report = StepReport(similarity, ratio, projected.bool(), norm.squeeze(), alive.bool().squeeze())
        return StepResult(loss_of(tree, nll[:count]), exact, report)

    def _launch(self, p: PackedPass, policy: str | None) -> Tensor:
        e, m, v = self._state
        nll, predicted, grad = launch_gradient(self._model, e, p, policy)
        self._alive &= torch.isfinite((nll * p.targets.weights).sum())
        report = self._model.ops.prompt_step(
            e, self._anchor, m, v, grad.to(e.dtype), factors=self._factors, region=self._region, rule=self._rule,
            clip_norm=self._clip_norm, alive=self._alive, before=self._before,
        )  # fmt: skip
        numbers = (
            nll, predicted == p.targets.ids, report.similarity, report.norm_ratio, report.projected,
            report.gradient_norm[None], report.alive[None],
        )  # fmt: skip
        return torch.cat([x.double() for x in numbers])
