"""The prompt's optimiser: AdamW or SGD in float32, clipping, learning-rate schedules, and one step of it all.

`prompt_step` is the plain-torch reference of the fused kernel: it reads e, e0, m, v, g and writes e, m, v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.trust_region import TrustRegion, cosine_similarity, norm_ratio

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class StepReport:
    """What one step did to each row of the prompt; all `[k]`."""

    similarity: Tensor  # cosine with the anchor after the step, float64
    norm_ratio: Tensor  # ‖e‖/‖e0‖ after the step, float64
    projected: Tensor  # bool: the trust region moved this row back, so it now lies on the region's boundary


def prompt_step(
    e: Tensor,
    e0: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    step: int,
    lr: float,
    region: TrustRegion,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> StepReport:
    """One AdamW step of the prompt, then the projection onto the trust region; `e`, `m`, `v` `[k, d]` in place.

    `g` is the gradient and `step` counts from 1 (bias correction). The arithmetic is that of torch.optim.AdamW
    (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2), bit for bit on the CPU:

        e ← e (1 − lr·weight_decay);  m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²
        e ← e − lr/(1 − β₁^step) · m / (√v / √(1 − β₂^step) + eps)

    Weight decay pulls towards zero, not towards the anchor (`Penalty` does that). Under a cosine cone it only shrinks
    the rows, hence 0 by default.
    """
    beta1, beta2 = betas
    e.mul_(1.0 - lr * weight_decay)
    m.lerp_(g, 1.0 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
    denominator = (v.sqrt() / math.sqrt(1.0 - beta2**step)).add_(eps)
    e.addcdiv_(m, denominator, value=-(lr / (1.0 - beta1**step)))
    return _into_region(e, e0, region)


def sgd_step(
    e: Tensor,
    e0: Tensor,
    m: Tensor,
    g: Tensor,
    *,
    lr: float,
    region: TrustRegion,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> StepReport:
    """One step of stochastic gradient descent, then the projection; `e` and `m` `[k, d]` in place; m starts at 0.

    As torch.optim.SGD: g ← g + weight_decay·e;  m ← momentum·m + g;  e ← e − lr·m.
    """
    if weight_decay != 0.0:
        g = g.add(e, alpha=weight_decay)
    m.mul_(momentum).add_(g)
    e.add_(m, alpha=-lr)
    return _into_region(e, e0, region)


def _into_region(e: Tensor, e0: Tensor, region: TrustRegion) -> StepReport:
    back = region.project(e, e0)
    projected = (back != e).any(dim=1)
    e.copy_(back)
    return StepReport(cosine_similarity(e, e0), norm_ratio(e, e0), projected)


def gradient_norm(g: Tensor) -> float:
    """Euclidean norm of the whole gradient, summed in float64: no overflow where float32 would have one."""
    return float(g.double().norm())


def clip_by_norm(g: Tensor, limit: float | None) -> float:
    """Scale `g` in place so that its Euclidean norm is at most `limit` (None: leave it); returns the norm before."""
    norm = gradient_norm(g)
    if limit is not None and norm > limit:
        g.mul_(limit / norm)
    return norm


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


def zeros_like_prompt(e: Tensor) -> tuple[Tensor, Tensor]:
    """Fresh moments m and v for the prompt `e` `[k, d]`."""
    return torch.zeros_like(e), torch.zeros_like(e)
