"""The fused optimiser step against the optimiser and the trust regions in plain torch, fp64 as the truth."""

import math

import pytest
import torch
from embedgrad.kernels import launch
from embedgrad.kernels.prompt_step import KINDS, prompt_step
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedgrad import optimizer
from embedgrad.trust_region import KINDS as REGIONS
from embedgrad.trust_region import (
    CosineCone,
    L2Ball,
    MeanCosine,
    NoRegion,
    Penalty,
    TrustRegion,
    cosine_similarity,
)

from .harness import (
    DEVICE,
    Layout,
    awkward_sizes,
    check_canaries,
    guarded,
    guarded_copy,
    laid_out,
    layouts,
    normal,
    same_bits,
    three_way,
)

QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**31)
BLOCKS = st.sampled_from([16, 64])  # 16: rows wider than one block
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


def stepped(tensors: list[Tensor], region: TrustRegion, step: int, clip: float | None) -> tuple[list[Tensor], Tensor]:
    """The same step by the optimiser in plain torch, in the tensors' type: e, m, v, and which rows were moved back."""
    e, anchor, m, v, g = (x.clone() for x in tensors)
    pull = region.penalty_gradient(e, anchor)
    g = g if pull is None else g + pull
    g = g if clip is None else g * clip
    report = optimizer.prompt_step(e, anchor, m, v, g, step=step, lr=0.05, region=region, weight_decay=0.1)
    return [e, m, v], report.projected


@QUICK
@given(
    SEEDS, awkward_sizes(1, 7), awkward_sizes(1, 50), REGION, st.sampled_from([0.02, 0.3, 2.0]), BLOCKS,
    st.sampled_from([None, 0.25]), layouts(), st.integers(1, 50),
)  # fmt: skip
@example(0, 5, 50, MeanCosine(0.95), 0.3, 16, None, "expanded", 1)
@example(0, 5, 50, CosineCone(-0.5, 0.9, 1.1), 2.0, 16, 0.25, "transposed", 1)
@example(0, 5, 1, CosineCone(-0.5), 2.0, 64, None, "contiguous", 1)
def test_prompt_step(
    seed: int, k: int, d: int, region: TrustRegion, spread: float, block: int, clip: float | None, layout: Layout,
    step: int,
) -> None:  # fmt: skip
    tensors = state(seed, k, d, spread)
    tensors[4] = laid_out(tensors[4], layout)
    scale = None if clip is None else guarded_copy(torch.tensor([clip], device=DEVICE))

    def run() -> list[Tensor]:
        e, m, v = (guarded_copy(tensors[i]) for i in (0, 2, 3))
        cosine, ratio = guarded((k,)), guarded((k,))
        projected = torch.empty(k, dtype=torch.bool, device=DEVICE)
        with launch.overridden("prompt_step", BLOCK=block, num_warps=1):
            prompt_step(
                e, guarded_copy(tensors[1]), m, v, tensors[4], step=step, lr=0.05, weight_decay=0.1, clip=scale,
                region=region.describe(), cosine=cosine, norm_ratio=ratio, projected=projected,
            )  # fmt: skip
        return [e, m, v, cosine, ratio, projected.byte()]

    e, m, v, cosine, ratio, projected = same_bits(run)
    plain, _ = stepped(tensors, region, step, clip)
    truth, moved = stepped([x.double() for x in tensors], region, step, clip)
    for name, found, own, exact in zip("emv", (e, m, v), plain, truth, strict=True):
        three_way(found, own, exact, what=name, by="max")
    anchor = tensors[1]
    assert torch.allclose(cosine.double(), cosine_similarity(e, anchor), atol=1e-6)
    assert torch.allclose(ratio.double(), optimizer.norm_ratio(e, anchor), rtol=1e-6)
    if isinstance(region, CosineCone):
        # exactly 0 is where the cone sends a row that points away; its cosine counts as 0, and it is inside
        inside = (cosine_similarity(e, anchor) >= region.tau - 1e-6) | (e == 0).all(1) | (d == 1)
        assert inside.all()
    decided = projected.bool() == moved
    if isinstance(region, CosineCone | L2Ball):
        # where the two differ, the row is on the boundary to within rounding, and hardly moved
        assert ((truth[0] - plain[0].double()).abs().amax(1)[~decided] < 1e-5).all()
    check_canaries()


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SEEDS, st.sampled_from([0.95, 0.999, 0.5]), BLOCKS)
def test_a_second_projection_changes_no_bit(seed: int, tau: float, block: int) -> None:
    e, anchor, m, v, g = state(seed, 4, 45, 1.0)
    m, g, v = torch.zeros_like(m), torch.zeros_like(g), torch.ones_like(v)
    results = []
    for _ in range(2):
        projected = torch.empty(4, dtype=torch.bool, device=DEVICE)
        with launch.overridden("prompt_step", BLOCK=block, num_warps=1):
            prompt_step(
                e, anchor, m, v, g, step=1, lr=0.0, region=CosineCone(tau).describe(),
                cosine=guarded((4,)), norm_ratio=guarded((4,)), projected=projected,
            )  # fmt: skip
        results.append(e.clone())
    assert torch.equal(*results)
    assert not projected.any()


def test_the_mean_cosine_is_met_from_below() -> None:
    e, anchor, m, v, g = state(3, 3, 40, 1.5)
    e[0] = anchor[0]  # a row to spare: the others' common cosine is below the mean
    cosine, projected = guarded((3,)), torch.empty(3, dtype=torch.bool, device=DEVICE)
    with launch.overridden("prompt_step", BLOCK=64):
        prompt_step(
            e, anchor, torch.zeros_like(m), v, torch.zeros_like(g), step=1, lr=0.0,
            region=MeanCosine(0.9).describe(), cosine=cosine, norm_ratio=guarded((3,)), projected=projected,
        )  # fmt: skip
    assert math.isclose(float(cosine.mean()), 0.9, abs_tol=1e-6)
    assert torch.allclose(cosine, torch.tensor([1.0, 0.85, 0.85], device=DEVICE), atol=1e-6)
    assert projected.any()


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize(("length", "ratio"), [(0.3, 0.9), (3.0, 1.1)])
def test_the_norm_band_scales_rows_that_the_cone_has_turned(length: float, ratio: float, block: int) -> None:
    _, anchor, m, v, g = state(5, 3, 40, 1.0)
    turned = normal(6, (3, 40))
    e = length * (anchor / anchor.norm(dim=1, keepdim=True) + turned / turned.norm(dim=1, keepdim=True))
    e *= anchor.norm(dim=1, keepdim=True)
    region, found = CosineCone(0.95, 0.9, 1.1), guarded_copy(e)
    norms, projected = guarded((3,)), torch.empty(3, dtype=torch.bool, device=DEVICE)
    with launch.overridden("prompt_step", BLOCK=block, num_warps=1):
        prompt_step(
            found, anchor, torch.zeros_like(m), v, torch.zeros_like(g), step=1, lr=0.0, region=region.describe(),
            cosine=guarded((3,)), norm_ratio=norms, projected=projected,
        )  # fmt: skip
    three_way(found, region.project(e, anchor), region.project(e.double(), anchor.double()), by="max")
    assert torch.allclose(norms, torch.full((3,), ratio), atol=1e-6)


def test_every_region_of_the_project_is_known() -> None:
    assert set(KINDS) == set(REGIONS)


def test_refusals() -> None:
    x = torch.zeros(2, 8)
    common = {
        "step": 1, "lr": 0.1, "cosine": torch.zeros(2), "norm_ratio": torch.zeros(2),
        "projected": torch.zeros(2, dtype=torch.bool),
    }  # fmt: skip
    with pytest.raises(ValueError, match="no trust region 'box'"):
        prompt_step(x, x, x, x, x, region={"kind": "box"}, **common)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float32"):
        prompt_step(x, x.half(), x, x, x, region={"kind": "none"}, **common)  # type: ignore[arg-type]
    wide = torch.zeros(2, 16)[:, ::2]
    with pytest.raises(ValueError, match="contiguous"):
        prompt_step(wide, x, x, x, x, region={"kind": "none"}, **common)  # type: ignore[arg-type]
