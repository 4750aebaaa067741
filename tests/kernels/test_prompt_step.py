"""The fused optimiser step against the optimiser and the trust regions in plain torch, fp64 as the truth."""

import math
from typing import Any

import pytest
import torch
from embedgrad.kernels.prompt_step import BALL, CONE, MEAN, NONE, WIDEST, prompt_step
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedgrad.backends.triton import OPS
from embedgrad.maths import optimizer
from embedgrad.maths.optimizer import SGD, AdamW, Rule, StepReport
from embedgrad.maths.trust_region import KINDS as REGIONS
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

from .harness import (
    DEVICE,
    Layout,
    awkward_sizes,
    check_canaries,
    guarded_copy,
    laid_out,
    layouts,
    normal,
    same_bits,
    three_way,
)

QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**31)
TAUS = st.sampled_from([0.95, 0.99999, 0.5, 0.0, -0.5, 1.0, -1.0])
REGION = st.one_of(
    st.builds(CosineCone, TAUS, st.sampled_from([None, 0.0, 0.9]), st.sampled_from([None, 1.0, 1.1])),
    st.builds(L2Ball, st.sampled_from([0.0, 0.1, 2.0]), st.booleans()),
    st.builds(MeanCosine, TAUS),
    st.builds(Penalty, st.sampled_from([0.0, 0.3])),
    st.just(NoRegion()),
)


def state(seed: int, k: int, d: int, spread: float) -> list[Tensor]:
    """e, e0, m, v, g; among the rows: e = 0, e0 = 0, and e opposite to e0."""
    anchor = normal(seed, (k, d))
    e = anchor + spread * normal(seed + 1, (k, d))
    m, v, g = normal(seed + 2, (k, d), scale=0.1), normal(seed + 3, (k, d)).square() * 0.01, normal(seed + 4, (k, d))
    if k > 3:
        for x in (m, g):
            x[:3] = 0
        e[0], anchor[1], e[2] = 0, 0, -2 * anchor[2]
    return [e, anchor, m, v, g]


RULES = st.one_of(
    st.builds(AdamW, st.sampled_from([(0.9, 0.999), (0.5, 0.9)]), st.just(1e-8), st.sampled_from([0.0, 0.1])),
    st.builds(SGD, st.sampled_from([0.0, 0.9]), st.sampled_from([0.0, 0.1])),
)


def stepped(
    tensors: list[Tensor], region: TrustRegion, rule: Rule, step: int, clip: float | None
) -> tuple[list[Tensor], StepReport]:
    """The same step by the optimiser in plain torch, in the tensors' type: e, m, v, and the report."""
    e, anchor, m, v, g = (x.clone() for x in tensors)
    report = optimizer.prompt_step(
        e, anchor, m, v, g, factors=rule.factors(step, 0.05), region=region, rule=rule, clip_norm=clip
    )
    return [e, m, v], report


def launched(
    tensors: list[Tensor], region: TrustRegion, rule: Rule, step: int, lr: float, clip: float | None, **more: Tensor
) -> tuple[list[Tensor], StepReport]:
    """The kernels' step on guarded copies: e, m, v, and the report."""
    e, m, v = (guarded_copy(tensors[i]) for i in (0, 2, 3))
    report = OPS.prompt_step(
        e, guarded_copy(tensors[1]), m, v, tensors[4].clone(memory_format=torch.preserve_format),
        factors=rule.factors(step, lr).to(DEVICE), region=region, rule=rule, clip_norm=clip, **more,
    )  # fmt: skip
    return [e, m, v], report


@QUICK
@given(
    SEEDS, awkward_sizes(1, 7), awkward_sizes(1, 50), REGION, RULES, st.sampled_from([0.02, 0.3, 2.0]),
    st.sampled_from([None, 0.25]), layouts(expanded=False), st.integers(1, 50),
)  # fmt: skip
@example(0, 5, 50, MeanCosine(0.95), AdamW(), 0.3, None, "transposed", 1)
@example(0, 5, 50, CosineCone(-0.5, 0.9, 1.1), AdamW(), 2.0, 0.25, "transposed", 1)
@example(0, 5, 1, CosineCone(-0.5), AdamW(), 2.0, None, "contiguous", 1)
@example(0, 5, 50, CosineCone(0.95), AdamW(), 2.0, None, "contiguous", 1)
@example(0, 5, 30, Penalty(0.3), SGD(0.9, 0.1), 2.0, 0.25, "stepped", 1)
@example(0, 131, 3, NoRegion(), SGD(), 0.3, 0.25, "contiguous", 1)
def test_prompt_step(
    seed: int, k: int, d: int, region: TrustRegion, rule: Rule, spread: float, clip: float | None, layout: Layout,
    step: int,
) -> None:  # fmt: skip
    tensors = state(seed, k, d, spread)
    tensors[4] = laid_out(tensors[4], layout)

    def run() -> list[Tensor]:
        moved, report = launched(tensors, region, rule, step, 0.05, clip)
        assert bool(report.alive)
        return [*moved, report.similarity, report.norm_ratio, report.projected.byte(), report.gradient_norm]

    e, m, v, cosine, ratio, projected, norm = same_bits(run)
    plain, _ = stepped(tensors, region, rule, step, clip)
    truth, expected = stepped([x.double() for x in tensors], region, rule, step, clip)
    for name, found, own, exact in zip("emv", (e, m, v), plain, truth, strict=True):
        three_way(found, own, exact, what=name, by="max")
    anchor = tensors[1]
    assert torch.allclose(cosine, cosine_similarity(e, anchor), atol=1e-12, rtol=0)
    assert torch.allclose(ratio, norm_ratio(e, anchor), rtol=1e-12, atol=0)
    assert float(norm) == pytest.approx(float(expected.gradient_norm), rel=1e-5)
    decided = projected.bool() == expected.projected
    if isinstance(region, CosineCone | L2Ball):
        # where the two differ, the row is on the boundary to within rounding, and hardly moved
        assert ((truth[0] - plain[0].double()).abs().amax(1)[~decided] < 1e-5).all()
    check_canaries()


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SEEDS, st.sampled_from([0.95, 0.999, 0.5]))
def test_a_second_projection_changes_no_bit(seed: int, tau: float) -> None:
    tensors = state(seed, 4, 45, 1.0)
    tensors[2:] = [torch.zeros_like(tensors[2]), torch.ones_like(tensors[3]), torch.zeros_like(tensors[4])]
    results = []
    for _ in range(2):
        (tensors[0], _, _), report = launched(tensors, CosineCone(tau), AdamW(), 1, 0.0, None)
        results.append(tensors[0].clone())
    assert torch.equal(*results)
    assert not report.projected.any()


def test_a_measured_cosine_is_never_below_tau() -> None:
    """Rows at angles around the cone's edge."""
    anchor, across = normal(8, (64, 40)), normal(9, (64, 40))
    across -= (across * anchor).sum(1, keepdim=True) / anchor.square().sum(1, keepdim=True) * anchor
    across *= (anchor.norm(dim=1) / across.norm(dim=1))[:, None]
    for tau in (0.95, 0.5, 0.0, 0.999):
        angle = torch.linspace(0.9, 1.1, 64, device=DEVICE)[:, None] * math.acos(tau)
        e = angle.cos() * anchor + angle.sin() * across
        still = [e, anchor, torch.zeros_like(e), torch.ones_like(e), torch.zeros_like(e)]
        (moved, _, _), report = launched(still, CosineCone(tau), AdamW(), 1, 0.0, None)
        assert float(cosine_similarity(moved, anchor).min()) >= tau
        assert 30 <= int(report.projected.sum()) <= 34


def test_the_mean_cosine_is_met_from_below() -> None:
    e, anchor, m, v, g = state(3, 3, 40, 1.5)
    e[0] = anchor[0]  # a row to spare: the others' common cosine is below the mean
    still = [e, anchor, torch.zeros_like(m), v, torch.zeros_like(g)]
    _, report = launched(still, MeanCosine(0.9), AdamW(), 1, 0.0, None)
    cosine = report.similarity
    assert math.isclose(float(cosine.mean()), 0.9, abs_tol=1e-6)
    assert torch.allclose(cosine, torch.tensor([1.0, 0.85, 0.85], dtype=torch.float64, device=DEVICE), atol=1e-6)
    assert report.projected.any()


@pytest.mark.parametrize(("length", "ratio"), [(0.3, 0.9), (3.0, 1.1)])
def test_the_norm_band_scales_rows_that_the_cone_has_turned(length: float, ratio: float) -> None:
    _, anchor, m, v, g = state(5, 3, 40, 1.0)
    turned = normal(6, (3, 40))
    e = length * (anchor / anchor.norm(dim=1, keepdim=True) + turned / turned.norm(dim=1, keepdim=True))
    e *= anchor.norm(dim=1, keepdim=True)
    region = CosineCone(0.95, 0.9, 1.1)
    still = [e, anchor, torch.zeros_like(m), v, torch.zeros_like(g)]
    (found, _, _), report = launched(still, region, AdamW(), 1, 0.0, None)
    three_way(found, region.project(e, anchor), region.project(e.double(), anchor.double()), by="max")
    assert torch.allclose(report.norm_ratio, torch.full_like(report.norm_ratio, ratio), atol=1e-6)


@pytest.mark.parametrize("where", ["gradient", "moment", "earlier"])
@pytest.mark.parametrize("region", [CosineCone(), MeanCosine()])
def test_a_step_that_is_not_finite_is_taken_back(where: str, region: TrustRegion) -> None:
    tensors = state(7, 3, 40, 1.0)
    if where != "earlier":
        tensors[4][1, 2] = math.nan if where == "gradient" else 1e30  # whose square is beyond fp32
    alive = torch.tensor(where != "earlier", device=DEVICE)
    before = torch.empty(3, 3, 40, device=DEVICE)
    moved, report = launched(tensors, region, AdamW(), 1, 0.05, None, alive=alive, before=before)
    assert not bool(report.alive)
    assert not bool(alive)
    for x, kept, old in zip(moved, before, (tensors[0], *tensors[2:4]), strict=True):
        assert torch.equal(x, old)
        assert torch.equal(kept, old)


def test_every_region_of_the_project_is_known() -> None:
    codes = {region().numbers(torch.float32).code for region in REGIONS.values()}
    assert codes == {NONE, CONE, BALL, MEAN}


def test_refusals() -> None:
    x, k = torch.zeros(2, 8), torch.zeros(2, dtype=torch.float64)
    common: dict[str, Any] = {
        "factors": AdamW().factors(1, 0.1), "adamw": True, "constants": (0.9, 0.1, 0.999, 0.001, 1e-8),
        "region": NoRegion().numbers(torch.float32), "clip_norm": None, "before": torch.zeros(3, 2, 8),
        "alive": torch.tensor(True), "cosine": k, "norm_ratio": k, "projected": torch.zeros(2, dtype=torch.bool),
        "norm": k[0],
    }  # fmt: skip
    with pytest.raises(ValueError, match="float32"):
        prompt_step(x, x.half(), x, x, x, **common)
    wide = torch.zeros(2, 16)[:, ::2]
    with pytest.raises(ValueError, match="contiguous"):
        prompt_step(wide, x, x, x, x, **common)
    wide = torch.zeros(2, WIDEST + 1)
    with pytest.raises(ValueError, match=f"at most {WIDEST}"):
        prompt_step(wide, wide, wide, wide, wide, **common)
    with pytest.raises(ValueError, match="cosine holds"):
        prompt_step(x, x, x, x, x, **common | {"cosine": k.float()})
