"""Loss and gradient of logits in place, against fp64."""

import pytest
import torch
from embedgrad.kernels import launch
from embedgrad.kernels.softmax_loss import softmax_loss
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .harness import (
    DEVICE,
    FLOAT_TYPES,
    TOLERANCE,
    awkward_sizes,
    check_canaries,
    guarded,
    guarded_copy,
    laid_out,
    normal,
    same_bits,
    three_way,
)

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**31)


def plain(z: Tensor, targets: Tensor, weights: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """nll, dz and the capped logits, by softmax − one-hot in z's type."""
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    at, counted = targets.clamp_min(0)[:, None], targets >= 0
    nll = torch.where(counted, capped.logsumexp(1) - capped.gather(1, at).squeeze(1), 0)
    dz = capped.softmax(1).scatter_add(1, at, torch.full_like(at, -1, dtype=capped.dtype))
    dz = dz if softcap is None else dz * (1 - (capped / softcap) ** 2)
    return nll, dz * torch.where(counted, weights.to(dz.dtype), 0)[:, None], capped


def some_targets(seed: int, rows: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, vocabulary, (rows,), generator=generator, device="cpu").to(DEVICE)


def run(
    z: Tensor, targets: Tensor, weights: Tensor | None, dtype: torch.dtype, *,
    softcap: float | None = None, programs: int = 3, padding: int = 0, block: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """nll, arg-max and dz with its rows' factors, in guarded memory; z [N, V] stays."""
    (rows, vocabulary), half = z.shape, dtype == torch.float16
    logits = guarded(z.shape, fill=z, strides=(vocabulary + padding, 1))
    nll, predicted = guarded((rows,)), guarded((rows,), torch.int64)
    factor = guarded((rows,)) if half and weights is not None else None
    with launch.overridden("softmax_loss", BLOCK=block, PROGRAMS=programs, num_warps=1):
        dz = softmax_loss(
            logits, targets, weights, dtype=dtype, softcap=softcap, nll=nll, predicted=predicted, factor=factor
        )
    return nll, predicted, dz if factor is None else dz.float() * factor[:, None]


@QUICK
@given(
    SEEDS, awkward_sizes(1, 20), awkward_sizes(1, 70), st.sampled_from(FLOAT_TYPES), st.sampled_from([None, 3.0]),
    st.sampled_from([1.0, 30.0, 1e4]), st.integers(1, 4), st.integers(0, 3), st.sampled_from([16, 64]),
)  # fmt: skip
@example(0, 3, 1, torch.float32, None, 1.0, 1, 0, 16)
@example(0, 17, 37, torch.float16, 3.0, 30.0, 4, 3, 16)
def test_softmax_loss(
    seed: int, rows: int, vocabulary: int, dtype: torch.dtype, softcap: float | None, scale: float, programs: int,
    padding: int, block: int,
) -> None:  # fmt: skip
    z, targets = normal(seed, (rows, vocabulary), scale=scale), some_targets(seed, rows, vocabulary)
    weights = laid_out(normal(seed + 1, (rows,)).relu(), "stepped")
    how = {"softcap": softcap, "programs": programs, "padding": padding, "block": block}
    nll, predicted, dz = same_bits(lambda: run(z, guarded_copy(targets), weights, dtype, **how))  # type: ignore[arg-type]
    plain_nll, plain_dz, _ = plain(z, targets, weights, softcap)
    true_nll, true_dz, capped = plain(z.double(), targets, weights.double(), softcap)
    # A loss is the difference of two logits, each of which fp32 rounds. The kernel's tiny losses are more exact than
    # the truth, which subtracts in fp64, hence + 1.
    three_way(nll + 1, plain_nll + 1, true_nll + 1, what="nll", tolerance=1e-6 * float(1 + capped.abs().max()))
    rounding = 2 * TOLERANCE[dtype] + 2e-7 * float(capped.abs().max())
    three_way(dz, plain_dz.to(dtype), true_dz, what="dz", tolerance=rounding)
    chosen = capped.gather(1, predicted[:, None]).squeeze(1)
    assert (capped.max(1).values - chosen <= 1e-5 * (1 + capped.abs().max(1).values)).all()
    alone, same, logits = run(z, targets, None, dtype, **how)  # type: ignore[arg-type]
    assert torch.equal(alone, nll)
    assert torch.equal(same, predicted)
    assert torch.equal(logits, z)
    check_canaries()


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_ignored_rows_and_rows_without_weight_have_no_gradient(dtype: torch.dtype) -> None:
    z = normal(0, (20, 40))
    z[3, 7] = float("inf")  # even where the row's own loss cannot be computed
    targets = torch.full((20,), -1, device=DEVICE)
    targets[10:] = 5
    nll, predicted, dz = run(z, targets, torch.zeros(20, device=DEVICE), dtype)
    assert not nll[:10].any()
    assert not dz.any()
    assert torch.equal(predicted[:3], z[:3].argmax(1))


def test_ties_go_to_the_lowest_token() -> None:
    z = normal(0, (4, 40)).clamp(max=1.0)
    z[:, [7, 23, 39]] = 3.0  # in three blocks of 16
    targets = torch.tensor([23, 39, 7, 0], device=DEVICE)
    assert run(z, targets, None, torch.float32)[1].tolist() == [7, 7, 7, 7]


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_confident_rows_keep_their_relative_precision(dtype: torch.dtype) -> None:
    """softmax − one-hot would round to 0 here: p_t = 1 − 1e-9."""
    z = 0.5 * normal(0, (6, 24))
    targets = torch.arange(6, device=DEVICE)
    z[targets, targets] = 24.0
    nll, _, dz = run(z, targets, torch.ones(6, device=DEVICE), dtype)
    true_nll, true_dz, _ = plain(z.double(), targets, torch.ones(6, device=DEVICE).double(), None)
    assert float(true_nll.max()) < 1e-8
    assert torch.allclose(nll.double(), true_nll, rtol=1e-5, atol=0)
    assert torch.allclose(dz.double(), true_dz, rtol=4e-5 + 2 * TOLERANCE[dtype], atol=0)


def test_a_logit_that_is_not_a_number_is_not_hidden() -> None:
    z = normal(0, (2, 40))
    z[1, 33] = float("nan")
    nll, _, _ = run(z, torch.tensor([3, 3], device=DEVICE), None, torch.float32)[:3]
    assert nll.isnan().tolist() == [False, True]


def test_rows_beyond_32_bits() -> None:
    """Rows that lie 2^30 elements apart: the last of three begins beyond 2^31. Only touched pages are real."""
    storage = torch.empty(2 * 2**30 + 16, device=DEVICE)
    z = storage.as_strided((3, 16), (2**30, 1))
    z.copy_(normal(0, (3, 16)))
    near, targets, weights = z.clone(), torch.tensor([3, 0, 9], device=DEVICE), torch.ones(3, device=DEVICE)
    nll, predicted = torch.empty(3, device=DEVICE), torch.empty(3, dtype=torch.int64, device=DEVICE)
    dz = softmax_loss(z, targets, weights, dtype=torch.float32, nll=nll, predicted=predicted)
    expected, _, near_dz = run(near, targets, weights, torch.float32, block=1024)
    assert torch.equal(nll, expected)
    assert torch.equal(dz, near_dz)


def test_no_rows() -> None:
    empty = torch.zeros(0, 9, device=DEVICE)
    none, index = torch.zeros(0, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert softmax_loss(empty, index, none, dtype=torch.bfloat16, nll=none, predicted=index).shape == (0, 9)


def test_refusals() -> None:
    z, ones = torch.zeros(2, 9, device=DEVICE), torch.ones(2, device=DEVICE)
    index = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    rest = {"nll": ones.clone(), "predicted": index.clone()}
    with pytest.raises(ValueError, match="contiguous rows"):
        softmax_loss(z.half(), index, ones, dtype=torch.float16, **rest)
    with pytest.raises(ValueError, match="weights has shape"):
        softmax_loss(z, index, torch.ones(3, device=DEVICE), dtype=torch.float32, **rest)
    with pytest.raises(ValueError, match="does not fit into the memory"):
        softmax_loss(z, index, ones, dtype=torch.float64, **rest)
    with pytest.raises(ValueError, match="needs `factor`"):
        softmax_loss(z, index, ones, dtype=torch.float16, **rest)
