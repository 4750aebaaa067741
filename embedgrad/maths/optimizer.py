"""The prompt's optimiser: clipping, AdamW or SGD, the trust region, and learning-rate schedules.

`prompt_step` is the plain form, in torch, of what the backends' kernels do. It asks the device for nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.maths.trust_region import TrustRegion, cosine_similarity, norm_ratio

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class AdamW:
    """torch.optim.AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2).

        e ← e (1 − lr·weight_decay);  m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²
        e ← e − lr/(1 − β₁^step) · m / (√v / √(1 − β₂^step) + eps)

    Weight decay pulls towards zero, not towards the anchor (`Penalty` does that). Under a cosine cone it only shrinks
    the rows, hence 0 by default.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def factors(self, step: int, lr: float) -> Tensor:
        """What changes from step to step [3] float64: 1 − lr·weight_decay, lr/(1 − β₁^step), √(1 − β₂^step); `step`
        counts from 1."""
        beta1, beta2 = self.betas
        changing = (1.0 - lr * self.weight_decay, lr / (1.0 - beta1**step), math.sqrt(1.0 - beta2**step))
        return torch.tensor(changing, dtype=torch.float64, device="cpu")

    def move(self, e: Tensor, m: Tensor, v: Tensor, g: Tensor, factors: Tensor) -> None:
        """One step of `e`, `m`, `v` in place, bit for bit torch.optim.AdamW's on the CPU."""
        decay, rate, correction = factors.to(e.dtype) if e.is_cuda else factors.tolist()
        beta1, beta2 = self.betas
        e.mul_(decay)
        m.lerp_(g, 1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        denominator = (v.sqrt() / correction).add_(self.eps)
        if e.is_cuda:
            e.sub_(m / denominator * rate)
        else:
            e.addcdiv_(m, denominator, value=-rate)


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD: g ← g + weight_decay·e;  m ← momentum·m + g;  e ← e − lr·m."""

    momentum: float = 0.0
    weight_decay: float = 0.0

    def factors(self, step: int, lr: float) -> Tensor:
        """What changes from step to step [3] float64: only the rate, the second, does."""
        return torch.tensor((1.0, lr, 1.0), dtype=torch.float64, device="cpu")

    def move(self, e: Tensor, m: Tensor, v: Tensor, g: Tensor, factors: Tensor) -> None:
        """One step of `e` and `m` in place; m starts at 0, v is not used."""
        if self.weight_decay != 0.0:
            g = g.add(e, alpha=self.weight_decay)
        m.mul_(self.momentum).add_(g)
        if e.is_cuda:
            e.sub_(m * factors[1].to(e.dtype))
        else:
            e.add_(m, alpha=-float(factors[1]))


Rule = AdamW | SGD
ADAMW = AdamW()


@dataclass(frozen=True)
class StepReport:
    """What one step did, on the prompt's device.

    similarity, norm_ratio [k] float64: cosine with the anchor and ‖e‖/‖e0‖ after the step. projected [k] bool: the
    trust region moved this row back, so that it lies on the region's boundary. gradient_norm [] float64: Euclidean norm
    of the whole gradient, a penalty's share included, before it was clipped. alive [] bool: see `prompt_step`.
    """

    similarity: Tensor
    norm_ratio: Tensor
    projected: Tensor
    gradient_norm: Tensor
    alive: Tensor


def prompt_step(
    e: Tensor,
    e0: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    factors: Tensor,
    region: TrustRegion,
    rule: Rule = ADAMW,
    clip_norm: float | None = None,
    alive: Tensor | None = None,
    before: Tensor | None = None,
) -> StepReport:
    """One step of the prompt: penalty, clipping, the rule, the projection; `e`, `m`, `v` [k, d] change in place.

    e0 [k, d]: the anchor; g [k, d]: the loss's gradient, which is used up. factors: `rule.factors(step, lr)`, on the
    prompt's device or the CPU. clip_norm: largest Euclidean norm of the whole gradient.

    alive [] bool, in place: whether this step and all before it were finite. Where it is False, or where the gradient,
    the new prompt or a moment is not finite, nothing moves and it is False from then on; so the last good state stays.
    before [3, k, d]: receives e, m and v as they were.
    """
    alive = torch.ones((), dtype=torch.bool, device=e.device) if alive is None else alive
    norm = clipped(g, e, e0, region, clip_norm)
    if before is not None:
        torch.stack((e, m, v), out=before)
    stepped, new_m, new_v = (x.clone() for x in (e, m, v))
    rule.move(stepped, new_m, new_v, g, factors)
    new_e = region.project(stepped, e0)
    projected = (new_e != stepped).any(dim=1)
    moved = (new_e, new_m, new_v)
    alive &= torch.isfinite(norm)
    for x in moved:
        alive &= torch.isfinite(x).all()
    for x, new in zip((e, m, v), moved, strict=True):
        x.copy_(torch.where(alive, new, x))
    return StepReport(cosine_similarity(e, e0), norm_ratio(e, e0), projected & alive, norm, alive)


def clipped(g: Tensor, e: Tensor, e0: Tensor, region: TrustRegion, limit: float | None) -> Tensor:
    """The norm [] of `g` [k, d] with a penalty's gradient added; in place, `g` is then scaled down to `limit`."""
    pull = region.penalty_gradient(e, e0)
    if pull is not None:
        g += pull
    norm = gradient_norm(g)
    if limit is not None:
        g.mul_(torch.where(norm > limit, limit / norm, torch.ones_like(norm)))
    return norm


def gradient_norm(g: Tensor) -> Tensor:
    """Euclidean norm of the whole gradient, [] float64, summed in float64: no overflow where float32 would have one."""
    return g.double().norm()


def learning_rate(schedule: str, peak: float, step: int, total: int, warmup: int = 0) -> float:
    """The rate of step `step` (counted from 0) of `total`.

    The first `warmup` steps rise linearly, the last of them at the peak. After them "constant" stays there, "linear"
    and "cosine" fall so that they would reach 0 at step `total`: no step that is taken has rate 0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    gone = (step - warmup) / max(1, total - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1.0 - gone)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * gone))
    raise ValueError(f"unknown schedule {schedule!r}; one of {', '.join(SCHEDULES)}")
