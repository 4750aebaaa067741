"""Cross entropy of h Wᵀ in one walk over the vocabulary, against fp64 on whole logits."""

from collections.abc import Callable

import pytest
import torch
from embedgrad.kernels import launch
from embedgrad.kernels.linear_cross_entropy import UNIT_ROUNDOFF, linear_cross_entropy
from embedgrad.kernels.packing import PackedWeight, quantize_int4, quantize_int8
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .harness import (
    DEVICE,
    FLOAT_TYPES,
    Layout,
    awkward_sizes,
    check_canaries,
    guarded,
    guarded_copy,
    laid_out,
    layouts,
    normal,
    same_bits,
    strides_of,
    three_way,
)

QUICK = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**31)
SMALL = {"BLOCK_N": 16, "BLOCK_V": 16, "BLOCK_D": 16, "BLOCK_E": 16, "num_warps": 1, "num_stages": 1}


def run_small(*args: Tensor | PackedWeight, programs: int = 6, **keywords: object) -> tuple[Tensor, Tensor]:
    with (
        launch.overridden("linear_cross_entropy", **SMALL, PROGRAMS=programs),
        launch.overridden("linear_cross_entropy_merge", BLOCK_N=4, BLOCK_D=16, num_warps=1),
    ):
        return linear_cross_entropy(*args, **keywords)  # type: ignore[arg-type]


def plain(
    h: Tensor, head: Tensor, targets: Tensor, weights: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """nll, dh and the logits, by whole logits in h's type, then fp32, as transformers computes the loss."""
    z = h @ head.to(h.dtype).T
    wide = z if z.dtype == torch.float64 else z.float()
    capped = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    at, counted = targets.clamp_min(0)[:, None], targets >= 0
    nll = torch.where(counted, capped.logsumexp(1) - capped.gather(1, at).squeeze(1), 0)
    dz = capped.softmax(1).scatter_add(1, at, torch.full_like(at, -1, dtype=capped.dtype))
    dz = dz if softcap is None else dz * (1 - (capped / softcap) ** 2)
    dz = dz * torch.where(counted, weights.to(dz.dtype), 0)[:, None]
    return nll, dz.to(h.dtype) @ head.to(h.dtype), capped


def some_targets(seed: int, rows: int, vocabulary: int) -> Tensor:
    return torch.randint(-1, vocabulary, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def check(
    h: Tensor, head: Tensor, targets: Tensor, weights: Tensor, softcap: float | None, programs: int, dh_layout: Layout
) -> None:
    def run() -> tuple[Tensor, Tensor, Tensor]:
        dh = guarded(h.shape, h.dtype, strides=strides_of(h.shape, dh_layout))
        nll, predicted = run_small(h, head, targets, weights, programs=programs, softcap=softcap, dh=dh)
        return nll, dh, predicted

    nll, dh, predicted = same_bits(run)
    plain_nll, plain_dh, _ = plain(h, head, targets, weights, softcap)
    true_nll, true_dh, z = plain(h.double(), head.double(), targets, weights.double(), softcap)
    # logits of size z have an absolute error of 2^-24 z in any fp32 product; the loss is a difference of two
    three_way(nll, plain_nll, true_nll, what="nll", tolerance=1e-6 * float(1 + z.abs().max()))
    u = 2 * UNIT_ROUNDOFF[h.dtype]
    three_way(dh, plain_dh, true_dh, what="dh", tolerance=2 * u + 1e-6 * float(z.abs().max()))
    best = z.max(1).values
    chosen = z.gather(1, predicted[:, None]).squeeze(1)
    assert (best - chosen <= 1e-5 * (1 + best.abs())).all()
    alone, _ = run_small(h, head, targets, weights, programs=programs, softcap=softcap)
    assert torch.equal(alone, nll)
    check_canaries()


@QUICK
@given(
    SEEDS, awkward_sizes(1, 20), awkward_sizes(1, 20), awkward_sizes(1, 50), st.sampled_from(FLOAT_TYPES),
    st.sampled_from([None, 3.0]), st.integers(1, 4), layouts(), layouts(), layouts(expanded=False),
)  # fmt: skip
@example(0, 17, 33, 37, torch.float32, None, 3, "expanded", "transposed", "stepped")
@example(0, 1, 1, 1, torch.float16, None, 1, "contiguous", "contiguous", "contiguous")
def test_linear_cross_entropy(
    seed: int, rows: int, d: int, vocabulary: int, dtype: torch.dtype, softcap: float | None, programs: int,
    layout: Layout, head_layout: Layout, dh_layout: Layout,
) -> None:  # fmt: skip
    h = laid_out(normal(seed, (rows, d), dtype), layout)
    head = laid_out(normal(seed + 1, (vocabulary, d), dtype), head_layout)
    targets, weights = some_targets(seed, rows, vocabulary), normal(seed + 2, (rows,)).relu()
    check(h, head, guarded_copy(targets), laid_out(weights, "stepped"), softcap, programs, dh_layout)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SEEDS, st.sampled_from([30.0, 300.0, 1e4]), st.sampled_from([None, 30.0]))
def test_extreme_logits(seed: int, size: float, softcap: float | None) -> None:
    h, head = normal(seed, (9, 20)), normal(seed + 1, (50, 20))
    h = h * size / float((h @ head.T).abs().max())
    check(h, head, some_targets(seed, 9, 50), torch.ones(9), softcap, 3, "contiguous")


def test_a_narrow_head_under_a_wide_h() -> None:
    h, head = normal(0, (5, 20)), normal(1, (30, 20), torch.float16)
    check(h, guarded_copy(head), some_targets(0, 5, 30), torch.ones(5), None, 2, "contiguous")


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("quantiser", "d"), [(quantize_int8, 32), (quantize_int8, 40), (quantize_int4, 100)])
def test_a_quantised_head(
    quantiser: Callable[[Tensor], tuple[PackedWeight, float]], d: int, dtype: torch.dtype
) -> None:
    """The same as with the dequantised head, up to the order of sums; d = 40 and 100 leave padding."""
    weight, _ = quantiser(normal(0, (37, d)))
    h, targets, weights = normal(1, (9, d), dtype), some_targets(0, 9, 37), normal(2, (9,)).abs()
    found = []
    for head in (weight, weight.dequantize(dtype)):
        dh = guarded((9, d), dtype)
        found.append((*run_small(h, head, targets, weights, programs=2, dh=dh), dh))
    (nll, predicted, dh), (other_nll, other_predicted, other_dh) = found
    assert torch.allclose(nll, other_nll, atol=1e-5)
    assert torch.equal(predicted, other_predicted)
    assert torch.allclose(dh, other_dh, atol=1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("programs", [1, 5])
def test_all_ignored_gives_zeros(programs: int) -> None:
    h, head = normal(0, (20, 24), torch.float16), normal(1, (40, 24), torch.float16)
    dh = guarded((20, 24), torch.float16)
    targets = torch.full((20,), -1, device=DEVICE)
    nll, predicted = run_small(h, head, targets, torch.ones(20), programs=programs, dh=dh)
    assert not nll.any()
    assert not dh.any()
    assert torch.equal(predicted, (h.double() @ head.double().T).argmax(1))


def test_no_rows() -> None:
    empty = torch.zeros(0, 8)
    nll, predicted = run_small(empty, torch.zeros(9, 8), torch.zeros(0, dtype=torch.int64), torch.zeros(0), dh=empty)
    assert nll.shape == predicted.shape == (0,)


def test_ties_go_to_the_lowest_token() -> None:
    head = normal(0, (40, 16))
    head[[7, 23, 39]] = 3 * head[7]  # in three tiles of 16, and in three splits
    h = head[7:8].expand(4, 16)
    targets = torch.tensor([23, 39, 7, 0], device=DEVICE)
    for programs in (1, 3):
        _, predicted = run_small(h, head, targets, torch.ones(4), programs=programs)
        assert predicted.tolist() == [7, 7, 7, 7]


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_confident_rows_keep_their_relative_precision(dtype: torch.dtype) -> None:
    """softmax − one-hot would round to 0 here: p_t = 1 − 1e-9."""
    head = torch.eye(24, 24, device=DEVICE).to(dtype)
    h = (normal(0, (6, 24)) * 0.5).to(dtype)
    targets = torch.arange(6, device=DEVICE)
    h[targets, targets] = 24.0
    dh = guarded((6, 24), dtype if dtype != torch.float16 else torch.float32)
    nll, _ = run_small(h, head, targets, torch.ones(6), dh=dh)
    true_nll, true_dh, _ = plain(h.double(), head.double(), targets, torch.ones(6), None)
    assert float(true_nll.max()) < 1e-8
    assert torch.allclose(nll.double(), true_nll, rtol=1e-5, atol=0)
    assert torch.allclose(dh.double(), true_dh, rtol=4 * 2.0**-11, atol=0)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_skipped_tiles_stay_within_the_stated_bound(dtype: torch.dtype) -> None:
    """‖dh − dh without skipping‖ ≤ u w (1 − p_t) max ‖W_v‖, and tiles are skipped."""
    u = UNIT_ROUNDOFF[dtype]
    head, h = normal(0, (160, 32), torch.float32), torch.zeros(16, 32)
    head[:, 0] = 0.0
    head[:16, 0] = 1.0  # the first tile has the mass, the others u / 100 of it
    gap = float(-torch.log(torch.tensor(u / 100)))
    h[:, 0] = gap
    h[:, 1:] = 0.01 * normal(1, (16, 31))
    head, h = head.to(dtype), h.to(dtype)
    targets, weights = torch.arange(16, device=DEVICE), torch.linspace(0.5, 2, 16)
    found = []
    for skip in (True, False):
        dh = guarded((16, 32))
        nll, _ = run_small(h, head, targets, weights, programs=1, dh=dh, skip=skip)
        found.append((dh, nll))
    (skipped, skipped_nll), (whole, nll) = found
    assert torch.equal(skipped_nll, nll)
    difference = (skipped.double() - whole.double()).norm(dim=1)
    if dtype != torch.float32:  # there, what is skipped is too small to change a sum
        assert (difference > 0).all(), "no tile was skipped"
    rest = 1 - torch.exp(-nll.double())
    rounding = 2.0**-22 * whole.double().norm(dim=1)
    assert (difference <= u * weights * rest * head.double().norm(dim=1).max() + rounding).all()


def test_nothing_is_skipped_where_it_matters() -> None:
    """A flat distribution needs every tile: skipping any would show."""
    h, head = normal(0, (16, 24)) * 0.01, normal(1, (100, 24))
    targets = some_targets(0, 16, 100).clamp_min(0)
    both = []
    for skip in (True, False):
        dh = guarded((16, 24))
        run_small(h, head, targets, torch.ones(16), dh=dh, skip=skip)
        both.append(dh)
    assert torch.equal(*both)


def test_offsets_beyond_32_bits() -> None:
    """A head whose rows lie 2^26 elements apart: the last of 40 begins beyond 2^31. Only touched pages are real."""
    storage = torch.empty(39 * 2**26 + 16, dtype=torch.float16)
    head = storage.as_strided((40, 16), (2**26, 1))
    head.copy_(normal(0, (40, 16), torch.float16))
    h, targets = normal(1, (3, 16), torch.float16), torch.tensor([39, 3, 38])
    dh = guarded((3, 16), torch.float16)
    nll, _ = run_small(h, head, targets, torch.ones(3), dh=dh)
    expected = guarded((3, 16), torch.float16)
    near, _ = run_small(h, head.contiguous(), targets, torch.ones(3), dh=expected)
    assert torch.equal(nll, near)
    assert torch.equal(dh, expected)


def test_refusals() -> None:
    h, head = torch.zeros(2, 8), torch.zeros(9, 8)
    targets, weights = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    with pytest.raises(ValueError, match="head has shape"):
        linear_cross_entropy(h, torch.zeros(9, 7), targets, weights)
    with pytest.raises(ValueError, match="weights has shape"):
        linear_cross_entropy(h, head, targets, torch.ones(3))
    with pytest.raises(ValueError, match="is expanded"):
        linear_cross_entropy(h, head, targets, weights, dh=torch.zeros(1, 8).expand(2, 8))
    with pytest.raises(ValueError, match="32 bits"):
        linear_cross_entropy(h, torch.zeros(8).as_strided((1, 8), (2**33, 1)), targets, weights)
