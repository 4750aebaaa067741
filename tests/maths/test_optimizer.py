"""The prompt step against torch's own optimisers, and the schedules against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedgrad.maths.optimizer import SGD, AdamW, StepReport, clipped, learning_rate, prompt_step
from embedgrad.maths.trust_region import CosineCone, NoRegion, Penalty, TrustRegion, cosine_similarity, norm_ratio

NOWHERE = torch.zeros(3, 5)


def take_step(
    e: Tensor, anchor: Tensor, m: Tensor, v: Tensor, g: Tensor, step: int, lr: float, region: TrustRegion
) -> StepReport:
    return prompt_step(e, anchor, m, v, g.clone(), factors=AdamW().factors(step, lr), region=region)


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
        rule = AdamW(betas, eps, weight_decay)
        prompt_step(ours, start, m, v, gradient, factors=rule.factors(step, 2e-2), rule=rule, region=NoRegion())
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(v, optimizer.state[theirs]["exp_avg_sq"], rtol=1e-6, atol=0)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.9]), st.sampled_from([0.0, 0.1]))
def test_sgd_equals_torch(seed: int, momentum: float, weight_decay: float) -> None:
    start, gradients = draw_prompt(seed, 3, 7)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([theirs], lr=1e-2, momentum=momentum, weight_decay=weight_decay, foreach=False)
    ours, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
        rule = SGD(momentum, weight_decay)
        prompt_step(ours, start, m, v, gradient, factors=rule.factors(1, 1e-2), rule=rule, region=NoRegion())
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-8)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-3, 0.1, 2.0]))
def test_step_ends_in_the_region_and_reports_it(seed: int, lr: float) -> None:
    start, gradients = draw_prompt(seed, 4, 9)
    region = CosineCone(0.95, 0.9, 1.1)
    e, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step, gradient in enumerate(gradients, start=1):
        free, free_m, free_v = e.clone(), m.clone(), v.clone()
        take_step(free, start, free_m, free_v, gradient, step, lr, NoRegion())
        report = take_step(e, start, m, v, gradient, step, lr, region)
        assert torch.equal(e, region.project(free, start))
        assert torch.equal(m, free_m)  # the projection leaves the moments alone
        assert torch.equal(v, free_v)
        assert torch.equal(report.similarity, cosine_similarity(e, start))
        assert torch.equal(report.norm_ratio, norm_ratio(e, start))
        assert torch.equal(report.projected, (e != free).any(dim=1))
        assert float(report.similarity.min()) >= 0.95
        assert bool(report.alive)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([None, 0.01, 1.0, 1e6]))
def test_clipping(seed: int, limit: float | None) -> None:
    gradient = draw_prompt(seed, 3, 5)[0]
    g = gradient.clone()
    norm = float(clipped(g, NOWHERE, NOWHERE, NoRegion(), limit))
    assert norm == pytest.approx(float(gradient.norm()), rel=1e-6)
    if limit is None or norm <= limit:
        assert torch.equal(g, gradient)
    else:
        assert float(g.norm()) == pytest.approx(limit, rel=1e-5)
        torch.testing.assert_close(g / g.norm(), gradient / gradient.norm())


def test_clipping_survives_squares_beyond_float32() -> None:
    gradient, nowhere = torch.full((2, 2), 1e30), torch.zeros(2, 2)
    assert float(clipped(gradient, nowhere, nowhere, NoRegion(), 1.0)) == pytest.approx(2e30)
    assert float(gradient.norm()) == pytest.approx(1.0)


def test_a_penalty_joins_the_gradient_before_it_is_clipped() -> None:
    start, (gradient, *_) = draw_prompt(1, 3, 5)
    e, region, g = start + 1, Penalty(0.5), gradient.clone()
    norm = clipped(g, e, start, region, 0.1)
    whole = gradient + region.penalty_gradient(e, start)
    assert float(norm) == pytest.approx(float(whole.double().norm()))
    torch.testing.assert_close(g, whole * (0.1 / norm).float())


@pytest.mark.parametrize("where", ["gradient", "moment", "earlier"])
def test_a_step_that_is_not_finite_moves_nothing_and_nor_does_any_after_it(where: str) -> None:
    start, (gradient, later, *_) = draw_prompt(2, 3, 5)
    state = [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]
    if where == "gradient":
        gradient[1, 2] = math.nan
    if where == "moment":
        gradient[1, 2] = 1e30  # whose square is beyond float32
    alive, before = torch.tensor(where != "earlier"), torch.empty(3, *start.shape)
    kept = [x.clone() for x in state]
    for step, g in enumerate((gradient, later), start=1):
        report = prompt_step(
            state[0], start, state[1], state[2], g, factors=AdamW().factors(step, 0.1), region=CosineCone(),
            alive=alive, before=before,
        )  # fmt: skip
        assert not bool(report.alive)
        assert not report.projected.any()
        assert all(torch.equal(x, y) for x, y in zip(state, kept, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(before, kept, strict=True))


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
