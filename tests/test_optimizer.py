"""The prompt step against torch's own optimisers, and the schedules against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedgrad.optimizer import clip_by_norm, learning_rate, prompt_step, sgd_step
from embedgrad.trust_region import CosineCone, NoRegion, cosine_similarity, norm_ratio


def draw_prompt(seed: int, k: int, d: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(k, d, generator=generator) * 10.0 ** (index % 5 - 3) for index in range(8)]
    return torch.randn(k, d, generator=generator), gradients


@settings(deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(1, 33),
    st.sampled_from([0.0, 0.01, 0.5]),
    st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.95, 0.98)]),
    st.sampled_from([1e-8, 1e-3]),
)
def test_adamw_equals_torch(
    seed: int, k: int, d: int, weight_decay: float, betas: tuple[float, float], eps: float
) -> None:
    start, gradients = draw_prompt(seed, k, d)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=2e-2, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False)
    ours, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step, gradient in enumerate(gradients, start=1):
        theirs.grad = gradient.clone()
        optimizer.step()
        prompt_step(
            ours, start, m, v, gradient, step=step, lr=2e-2, betas=betas, eps=eps, weight_decay=weight_decay,
            region=NoRegion(),
        )  # fmt: skip
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(v, optimizer.state[theirs]["exp_avg_sq"], rtol=1e-6, atol=0)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.9]), st.sampled_from([0.0, 0.1]))
def test_sgd_equals_torch(seed: int, momentum: float, weight_decay: float) -> None:
    start, gradients = draw_prompt(seed, 3, 7)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([theirs], lr=1e-2, momentum=momentum, weight_decay=weight_decay, foreach=False)
    ours, m = start.clone(), torch.zeros_like(start)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
        sgd_step(ours, start, m, gradient, lr=1e-2, momentum=momentum, weight_decay=weight_decay, region=NoRegion())
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-8)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-3, 0.1, 2.0]))
def test_step_ends_in_the_region_and_reports_it(seed: int, lr: float) -> None:
    start, gradients = draw_prompt(seed, 4, 9)
    region = CosineCone(0.95, 0.9, 1.1)
    e, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step, gradient in enumerate(gradients, start=1):
        free, free_m, free_v = e.clone(), m.clone(), v.clone()
        prompt_step(free, start, free_m, free_v, gradient, step=step, lr=lr, region=NoRegion())
        report = prompt_step(e, start, m, v, gradient, step=step, lr=lr, region=region)
        assert torch.equal(e, region.project(free, start))
        assert torch.equal(m, free_m)  # the projection leaves the moments alone
        assert torch.equal(v, free_v)
        assert torch.equal(report.similarity, cosine_similarity(e, start))
        assert torch.equal(report.norm_ratio, norm_ratio(e, start))
        assert torch.equal(report.projected, (e != free).any(dim=1))
        assert float(report.similarity.min()) >= 0.95 - 1e-6


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([None, 0.01, 1.0, 1e6]))
def test_clipping(seed: int, limit: float | None) -> None:
    gradient = draw_prompt(seed, 3, 5)[0]
    clipped = gradient.clone()
    norm = clip_by_norm(clipped, limit)
    assert norm == pytest.approx(float(gradient.norm()), rel=1e-6)
    if limit is None or norm <= limit:
        assert torch.equal(clipped, gradient)
    else:
        assert float(clipped.norm()) == pytest.approx(limit, rel=1e-5)
        torch.testing.assert_close(clipped / clipped.norm(), gradient / gradient.norm())


def test_clipping_survives_squares_beyond_float32() -> None:
    gradient = torch.full((2, 2), 1e30)
    assert clip_by_norm(gradient, 1.0) == pytest.approx(2e30)
    assert float(gradient.norm()) == pytest.approx(1.0)


@settings(deadline=None)
@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(1, 60), st.integers(0, 70))
def test_schedules(schedule: str, total: int, warmup: int) -> None:
    rates = [learning_rate(schedule, 0.5, step, total, warmup) for step in range(total)]
    assert all(0 < rate <= 0.5 for rate in rates)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if falling:
        assert falling[0] == 0.5
        expected = {
            "constant": 0.5,
            "linear": 0.5 / len(falling),
            "cosine": 0.25 * (1 + math.cos(math.pi * (1 - 1 / len(falling)))),
        }
        assert falling[-1] == pytest.approx(expected[schedule])
    if 0 < warmup <= total:
        assert rates[warmup - 1] == 0.5
        assert rates[0] == pytest.approx(0.5 / warmup)


def test_unknown_schedule_is_an_error() -> None:
    with pytest.raises(ValueError, match="constant, linear, cosine"):
        learning_rate("step", 1.0, 5, 10)
