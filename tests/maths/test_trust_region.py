"""Trust regions: the closed forms against their definitions, on rows that hypothesis draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedgrad.maths.trust_region import (
    CosineCone,
    L2Ball,
    MeanCosine,
    NoRegion,
    Penalty,
    TrustRegion,
    cosine_similarity,
    norm_ratio,
)
from embedgrad.util.errors import ConfigError

TAUS = st.sampled_from([-1.0, -0.7, -0.2, 0.0, 0.3, 0.9, 0.95, 0.999, 0.9999999, 1.0])
DTYPES = st.sampled_from([torch.float32, torch.float64])


@st.composite
def prompts(draw: st.DrawFn, dtype: torch.dtype | None = None, min_d: int = 1) -> tuple[Tensor, Tensor]:
    """A prompt and its anchor `[k, d]`: near, far, opposite and equal rows, of lengths from 1e-3 to 1e3."""
    k, d = draw(st.integers(1, 6)), draw(st.integers(min_d, 19))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = dtype or draw(DTYPES)
    anchor = torch.randn(k, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(k, d, generator=generator, dtype=torch.float64)
    spread = torch.tensor([[draw(st.sampled_from([0.0, 1e-7, 1e-4, 0.1, 0.5, 3.0, 1e4]))] for _ in range(k)])
    along = torch.tensor([[draw(st.sampled_from([1.0, 1.0, -1.0]))] for _ in range(k)])
    length = torch.tensor([[10.0 ** draw(st.integers(-3, 3))] for _ in range(k)])
    e = length * (along * anchor + spread * noise)
    return e.to(dtype), (anchor * 10.0 ** draw(st.integers(-2, 2))).to(dtype)


@st.composite
def regions(draw: st.DrawFn) -> TrustRegion:
    kind = draw(st.sampled_from(["cone", "band", "mean", "ball", "absolute"]))
    tau = draw(TAUS)
    if kind == "cone":
        return CosineCone(tau)
    if kind == "band":
        low = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
        return CosineCone(tau, low, draw(st.sampled_from([None, 1.0, 1.3, 2.0])))
    if kind == "mean":
        return MeanCosine(tau)
    return L2Ball(draw(st.sampled_from([0.0, 0.01, 0.5, 2.0])), relative=kind == "ball")


def measured_excess(region: TrustRegion, e: Tensor, anchor: Tensor) -> float:
    """By how much `e` breaks the region's definition at worst: cosines, length ratios, distances in row lengths."""
    if isinstance(region, MeanCosine):
        return region.tau - float(cosine_similarity(e, anchor).mean())
    if isinstance(region, L2Ball):
        norm = anchor.double().norm(dim=1)
        bound = region.radius * (norm if region.relative else 1.0)
        return float((((e.double() - anchor.double()).norm(dim=1) - bound) / (norm + bound)).max())
    assert isinstance(region, CosineCone)
    here = e.double().norm(dim=1) > 0  # the zero row is in every cone
    excess = torch.where(here, region.tau - cosine_similarity(e, anchor), torch.tensor(-1.0, dtype=torch.float64))
    ratio = norm_ratio(e, anchor)
    if region.norm_max is not None:
        excess = torch.maximum(excess, ratio - region.norm_max)
    if region.norm_min is not None:
        excess = torch.maximum(excess, region.norm_min - ratio)
    return float(excess.max())


@settings(deadline=None)
@given(prompts(), regions())
def test_projection_is_feasible(prompt: tuple[Tensor, Tensor], region: TrustRegion) -> None:
    e, anchor = prompt
    projected = region.project(e, anchor)
    assert projected.dtype == e.dtype
    assert torch.isfinite(projected).all()
    assert measured_excess(region, projected, anchor) <= 1e-6


@settings(deadline=None)
@given(prompts(), regions())
def test_projection_is_idempotent_bit_for_bit(prompt: tuple[Tensor, Tensor], region: TrustRegion) -> None:
    e, anchor = prompt
    once = region.project(e, anchor)
    assert torch.equal(region.project(once, anchor), once)


@settings(deadline=None)
@given(prompts(), regions())
def test_identity_inside_and_argument_untouched(prompt: tuple[Tensor, Tensor], region: TrustRegion) -> None:
    e, anchor = prompt
    before = e.clone()
    projected = region.project(e, anchor)
    assert torch.equal(e, before)
    if measured_excess(region, e, anchor) <= 0:
        assert torch.equal(projected, e)


@settings(deadline=None)
@given(prompts(min_d=2), st.floats(-0.999, 0.999), st.integers(0, 2**31))
def test_cone_projection_is_the_nearest_point(prompt: tuple[Tensor, Tensor], tau: float, seed: int) -> None:
    e, anchor = (part.double() for part in prompt)
    projected = CosineCone(tau).project(e, anchor)
    distance = (e - projected).norm(dim=1)
    generator = torch.Generator().manual_seed(seed)
    unit = anchor / anchor.norm(dim=1, keepdim=True)
    for spread in (1.0, 0.1, 1e-3):
        for _ in range(30):  # points of the cone: some anywhere, most around the projection
            around = (
                projected + spread * e.norm(dim=1, keepdim=True) * torch.randn(e.shape, generator=generator).double()
            )
            across = around - (around * unit).sum(1, keepdim=True) * unit
            across = across / across.norm(dim=1, keepdim=True).clamp_min(1e-100)
            cosine = tau + (1 - tau) * torch.rand(len(e), 1, generator=generator).double().pow(4)
            direction = cosine * unit + (1 - cosine**2).sqrt() * across
            feasible = direction * (e * direction).sum(1, keepdim=True).clamp_min(0)  # best length on that ray
            assert (distance <= (e - feasible).norm(dim=1) + 1e-9 * e.norm(dim=1)).all()


@settings(deadline=None, max_examples=40)
@given(
    prompts(min_d=2), st.floats(0.0, 0.999), st.sampled_from([(0.5, 0.8), (0.9, 1.1), (1.0, 1.0)]), st.integers(0, 99)
)
def test_cone_with_band_is_the_nearest_point(
    prompt: tuple[Tensor, Tensor], tau: float, band: tuple[float, float], seed: int
) -> None:
    e, anchor = (part.double() for part in prompt)
    kept = CosineCone(tau).project(e, anchor).norm(dim=1) > 0  # the polar cone has the stated answer instead
    assume(bool(kept.any()))
    e, anchor = e[kept], anchor[kept]
    projected = CosineCone(tau, *band).project(e, anchor)
    distance = (e - projected).norm(dim=1)
    generator = torch.Generator().manual_seed(seed)
    for spread in (1.0, 0.1, 1e-3):
        for _ in range(30):
            other = projected + spread * projected.norm(dim=1, keepdim=True) * torch.randn(e.shape, generator=generator)
            feasible = CosineCone(tau, *band).project(other, anchor)
            assert (distance <= (e - feasible).norm(dim=1) + 1e-9 * (e.norm(dim=1) + feasible.norm(dim=1))).all()


@pytest.mark.parametrize("tau", [-0.5, 0.0, 0.6, 0.95])
def test_cone_projection_against_a_numerical_minimiser(tau: float) -> None:
    """In the plane of e and e0 the nearest point of a ray fan is found by a dense search over angle and length."""
    rng = np.random.default_rng(7)
    for _ in range(20):
        e, anchor = rng.normal(size=2), rng.normal(size=2)
        half_angle = math.acos(tau)
        angles = math.atan2(anchor[1], anchor[0]) + np.linspace(-half_angle, half_angle, 20001)
        rays = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        lengths = np.maximum(rays @ e, 0.0)
        best = np.linalg.norm(lengths[:, None] * rays - e, axis=1).min()
        projected = CosineCone(tau).project(torch.tensor(e)[None], torch.tensor(anchor)[None])[0]
        distance = float((projected - torch.tensor(e)).norm())
        assert best - 4e-4 * float(np.linalg.norm(e)) <= distance <= best + 1e-9  # the search's angles are 3e-4 apart


@settings(deadline=None)
@given(prompts(dtype=torch.float64), st.floats(0.0, 1.0), st.integers(0, 2**31), st.sampled_from([1e-3, 0.1, 1.0, 10]))
def test_convex_projections_are_non_expansive(
    prompt: tuple[Tensor, Tensor], tau: float, seed: int, spread: float
) -> None:
    e, anchor = prompt
    generator = torch.Generator().manual_seed(seed)
    other = e + spread * e.norm(dim=1, keepdim=True) * torch.randn(e.shape, generator=generator, dtype=e.dtype)
    slack = 1e-9 * (e.norm(dim=1) + other.norm(dim=1) + anchor.norm(dim=1))
    for region in (CosineCone(tau), CosineCone(tau, None, 1.2), L2Ball(0.4), L2Ball(0.4, relative=False)):
        moved = (region.project(e, anchor) - region.project(other, anchor)).norm(dim=1)
        assert (moved <= (e - other).norm(dim=1) + slack).all()


@settings(deadline=None)
@given(prompts(dtype=torch.float64, min_d=2), regions(), st.integers(0, 2**31), st.sampled_from([1e-2, 0.3, 7.0]))
def test_equivariant_to_rotation_and_scale(
    prompt: tuple[Tensor, Tensor], region: TrustRegion, seed: int, scale: float
) -> None:
    e, anchor = prompt
    if isinstance(region, L2Ball):
        assume(region.relative)
    # Opposite to the anchor all points of a circle are equally near, and the stated choice depends on the axes.
    assume(bool((cosine_similarity(e, anchor) > -1 + 1e-9).all()))
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(e.shape[1], e.shape[1], generator=generator, dtype=torch.float64))
    straight = region.project(e, anchor) @ rotation * scale
    turned = region.project(e @ rotation * scale, anchor @ rotation * scale)
    assert ((straight - turned).norm(dim=1) <= 1e-6 * scale * (e.norm(dim=1) + anchor.norm(dim=1))).all()


@settings(deadline=None)
@given(prompts())
def test_tau_of_one_is_the_ray_and_of_minus_one_everything(prompt: tuple[Tensor, Tensor]) -> None:
    e, anchor = prompt
    assert torch.equal(CosineCone(-1.0).project(e, anchor), e)
    assert torch.equal(MeanCosine(-1.0).project(e, anchor), e)
    onto = CosineCone(1.0).project(e, anchor).double()
    unit = anchor.double() / anchor.double().norm(dim=1, keepdim=True)
    ray = (e.double() * unit).sum(dim=1, keepdim=True).clamp_min(0) * unit
    assert ((onto - ray).norm(dim=1) <= 3e-7 * e.double().norm(dim=1)).all()


def test_stated_answers_of_degenerate_rows() -> None:
    anchor = torch.tensor([[1.0, 2.0, -2.0]])
    opposite, zero = -0.5 * anchor, torch.zeros(1, 3)
    for tau in (0.0, 0.95, 1.0):
        assert torch.equal(CosineCone(tau).project(opposite, anchor), zero)
        assert torch.equal(CosineCone(tau, norm_min=0.5).project(opposite, anchor), 0.5 * anchor)
    for tau in (-0.3, -0.99):
        turned = CosineCone(tau).project(opposite, anchor)
        assert float(cosine_similarity(turned, anchor)) == pytest.approx(tau, abs=1e-6)
        assert float((turned - opposite).norm()) == pytest.approx(1.5 * math.sqrt(1 - tau**2), rel=1e-5)
    assert torch.equal(CosineCone(0.95).project(zero, anchor), zero)
    assert torch.equal(CosineCone(0.95, norm_min=0.25).project(zero, anchor), 0.25 * anchor)
    lone = torch.tensor([[2.0]])
    assert torch.equal(CosineCone(-0.5).project(-lone, lone), torch.zeros(1, 1))
    assert torch.equal(MeanCosine(0.9).project(-3 * lone, lone), lone)
    assert torch.equal(MeanCosine(0.9).project(zero, anchor), anchor)


@pytest.mark.parametrize("region", [CosineCone(0.9, 0.5, 1.1), MeanCosine(0.9), L2Ball(1e9), Penalty(0.1), NoRegion()])
def test_row_without_an_anchor_is_left_alone(region: TrustRegion) -> None:
    anchor = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    e = torch.tensor([[5.0, -1.0], [3.0, 4.0]])
    assert torch.equal(region.project(e, anchor), e) or isinstance(region, L2Ball)
    assert cosine_similarity(e, anchor).tolist() == [1.0, pytest.approx(1.0)]
    assert norm_ratio(e, anchor).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "region", [CosineCone(0.9), CosineCone(0.9, 0.5, 1.1), MeanCosine(0.9), L2Ball(0.1), Penalty(0.1), NoRegion()]
)
@pytest.mark.parametrize("spoilt", [math.inf, -math.inf, math.nan])
def test_no_projection_hides_a_value_that_is_not_finite(region: TrustRegion, spoilt: float) -> None:
    e = torch.tensor([[1.0, spoilt, 0.0], [1.0, -1.0, 0.1]])
    projected = region.project(e, torch.ones(2, 3))
    assert not torch.isfinite(projected[0]).all()


@settings(deadline=None)
@given(prompts(), st.floats(-0.99, 0.999))
def test_mean_cosine_raises_only_the_lowest_to_one_level(prompt: tuple[Tensor, Tensor], tau: float) -> None:
    e, anchor = prompt
    before = cosine_similarity(e, anchor)
    assume(float(before.mean()) < tau - 1e-5)
    projected = MeanCosine(tau).project(e, anchor)
    after = cosine_similarity(projected, anchor)
    moved = (projected != e).any(dim=1)
    assert (before[moved].max() <= before[~moved].min() + 1e-6) if bool((~moved).any()) else True
    if e.shape[1] > 1:
        assert float(after.mean()) == pytest.approx(tau, abs=1e-6)
        assert float(after[moved].max() - after[moved].min()) <= 1e-6
        lengths = e.double().norm(dim=1)
        assert ((projected.double().norm(dim=1) - lengths).abs() <= 1e-6 * lengths).all()


def test_penalty_gradient_against_autograd() -> None:
    generator = torch.Generator().manual_seed(3)
    anchor = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    anchor[2] = 0
    e = (anchor + torch.randn(4, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    scale = anchor.square().sum(1)
    scale[2] = 1
    value = (0.7 * 0.5 * (e - anchor).square().sum(1) / scale).sum()
    value.backward()
    value = value.detach()
    region = Penalty(0.7)
    gradient = region.penalty_gradient(e.detach(), anchor)
    assert gradient is not None
    assert e.grad is not None
    torch.testing.assert_close(gradient, e.grad)
    assert region.penalty(e.detach(), anchor) == pytest.approx(float(value))
    assert torch.equal(region.project(e.detach(), anchor), e.detach())
    for other in (CosineCone(), MeanCosine(), L2Ball(), NoRegion()):
        assert other.penalty_gradient(e.detach(), anchor) is None
        assert other.penalty(e.detach(), anchor) == 0.0


@settings(max_examples=30, deadline=None)
@given(regions())
def test_description_round_trip(region: TrustRegion) -> None:
    assert TrustRegion.from_dict(region.describe()) == region


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "cosine", "tau": 1.5}, ["tau", "1.5", "from -1 to 1"]),
        ({"kind": "cosine", "tau": -1.01}, ["tau", "-1.01", "from -1 to 1"]),
        ({"kind": "mean_cosine", "tau": float("nan")}, ["tau", "nan"]),
        ({"kind": "cosine", "tau": "high"}, ["tau", "'high'", "number"]),
        ({"kind": "cosine", "tau": True}, ["tau", "True"]),
        ({"kind": "cosine", "norm_min": 2.0, "norm_max": 1.0}, ["norm_min", "norm_max"]),
        ({"kind": "l2_ball", "radius": -0.1}, ["radius", "-0.1"]),
        ({"kind": "l2_ball", "relative": 1}, ["relative", "true or false"]),
        ({"kind": "penalty", "weight": -1}, ["weight", "-1"]),
        ({"kind": "cone"}, ["'cone'", "cosine", "mean_cosine", "l2_ball", "penalty", "none"]),
        ({"kind": "cosine", "taau": 0.9}, ["'taau'", "did you mean 'tau'"]),
        ({"kind": "none", "tau": 0.9}, ["'none'", "'tau'"]),
        ({"kind": ["cosine"]}, ["kind"]),
    ],
)
def test_unusable_regions_are_refused(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        TrustRegion.from_dict(values)
    for word in words:
        assert word in str(refusal.value)
