"""Products with int8 and int4 weights against fp64 products with the same dequantised weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from embedgrad.kernels import launch
from embedgrad.kernels.packing import PackedWeight, quantize_int4, quantize_int8
from embedgrad.kernels.quantized_linear import quantized_linear, quantized_linear_backward
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .harness import (
    DEVICE,
    FLOAT_TYPES,
    TOLERANCE,
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

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**31)
FORMS = st.sampled_from(["int8", "int8 with offsets", "int4", "int4 without offsets"])
GROUPS = st.sampled_from([(32, 16), (32, 32), (32, 64), (64, 32)])  # group size and columns of a tile
PROGRAMS = st.sampled_from([1, 7, 50])  # with many programs the reduction is split


def weight_of(form: str, seed: int, n: int, k: int, group: int) -> PackedWeight:
    """A random weight of each form, its tensors between canaries."""
    made = (quantize_int8 if form.startswith("int8") else quantize_int4)(normal(seed, (n, k)), group)[0]
    offsets = made.offsets
    if form == "int8 with offsets":
        offsets = normal(seed + 1, tuple(made.scales.shape), made.scales.dtype)
    elif form == "int4 without offsets":
        offsets = None
    packed, scales = guarded_copy(made.packed), guarded_copy(made.scales)
    kept = None if offsets is None else guarded_copy(offsets)
    return PackedWeight(made.kind, packed, scales, kept, group, made.shape)


@contextmanager
def small(name: str, block_k: int, programs: int = 1) -> Iterator[None]:
    """Small tiles, so that small matrices have several."""
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": block_k, "num_warps": 1, "num_stages": 1}
    with (
        launch.overridden(name, **tiles, PROGRAMS=programs),
        launch.overridden("quantized_linear_reduce", BLOCK=16, num_warps=1),
    ):
        yield


@QUICK
@given(
    SEEDS, awkward_sizes(1, 20), awkward_sizes(1, 20), awkward_sizes(1, 150), FORMS, GROUPS, PROGRAMS,
    st.sampled_from(FLOAT_TYPES), st.booleans(), st.sampled_from(["", "add", "add in place"]), layouts(),
    layouts(expanded=False),
)  # fmt: skip
@example(0, 3, 17, 96, "int4", (32, 32), 1, torch.float32, True, "add", "transposed", "transposed")
@example(0, 3, 17, 100, "int4", (32, 64), 50, torch.float16, True, "add in place", "expanded", "contiguous")
def test_quantized_linear(
    seed: int, rows: int, n: int, k: int, form: str, group: tuple[int, int], programs: int, dtype: torch.dtype,
    bias: bool, add: str, layout: Layout, out_layout: Layout,
) -> None:  # fmt: skip
    weight = weight_of(form, seed, n, k, group[0])
    x = laid_out(normal(seed + 2, (rows, k), dtype), layout)
    b = guarded_copy(normal(seed + 3, (n,), dtype)) if bias else None
    other = normal(seed + 4, (rows, n), dtype) if add else None

    def run() -> Tensor:
        out = guarded((rows, n), dtype, strides=strides_of((rows, n), out_layout))
        added = other
        if add == "add in place":
            added = out.copy_(other)
        with small("quantized_linear", group[1], programs):
            return quantized_linear(x, weight, out=out, bias=b, add=added)

    out = same_bits(run)
    zero = torch.zeros(1, dtype=dtype, device=DEVICE)
    terms = [zero if t is None else t for t in (b, other)]
    plain = x @ weight.dequantize(dtype).T + terms[0] + terms[1]
    truth = x.double() @ weight.dequantize(torch.float64).T + terms[0].double() + terms[1].double()
    three_way(out, plain, truth)
    check_canaries()


@QUICK
@given(
    SEEDS, awkward_sizes(1, 20), awkward_sizes(1, 40), awkward_sizes(1, 150), FORMS, GROUPS, PROGRAMS,
    st.sampled_from(FLOAT_TYPES), layouts(), layouts(expanded=False),
)  # fmt: skip
@example(0, 3, 17, 96, "int4", (32, 32), 50, torch.float32, "transposed", "stepped")
def test_quantized_linear_backward(
    seed: int, rows: int, n: int, k: int, form: str, group: tuple[int, int], programs: int, dtype: torch.dtype,
    layout: Layout, out_layout: Layout,
) -> None:  # fmt: skip
    weight = weight_of(form, seed, n, k, group[0])
    dy = laid_out(normal(seed + 2, (rows, n), dtype), layout)

    def run() -> Tensor:
        out = guarded((rows, k), dtype, strides=strides_of((rows, k), out_layout))
        with small("quantized_linear_backward", group[1], programs):
            return quantized_linear_backward(dy, weight, out=out)

    out = same_bits(run)
    # dy times a scale is rounded where a plain product rounds W: as often, but at another place.
    three_way(
        out, dy @ weight.dequantize(dtype), dy.double() @ weight.dequantize(torch.float64), factor=2.0,
        tolerance=2 * TOLERANCE[dtype],
    )  # fmt: skip
    check_canaries()


def test_weights_as_small_as_a_models_keep_their_precision_in_float16() -> None:
    """dy times the scale of such a weight is below float16's normal numbers."""
    weight = quantize_int8(0.02 * normal(0, (33, 77)))[0]
    dy = 0.01 * normal(1, (3, 33), torch.float16)
    with small("quantized_linear_backward", 32):
        out = quantized_linear_backward(dy, weight, out=guarded((3, 77), torch.float16))
    plain = dy @ weight.dequantize(torch.float16)
    three_way(out, plain, dy.double() @ weight.dequantize(torch.float64))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_both_directions_read_the_same_weight(form: str) -> None:
    """<x Wᵀ, y> = <x, y W>: in fp32 both are the same sum in another order."""
    weight = weight_of(form, 0, 21, 70, 32)
    x, y = normal(1, (4, 70)), normal(2, (4, 21))
    with small("quantized_linear", 32), small("quantized_linear_backward", 32):
        forward = quantized_linear(x, weight, out=guarded((4, 21)))
        backward = quantized_linear_backward(y, weight, out=guarded((4, 70)))
    assert float((forward.double() * y).sum()) == pytest.approx(float((x.double() * backward).sum()), rel=1e-4)


def test_refusals() -> None:
    weight = quantize_int8(normal(0, (5, 64)))[0]
    with pytest.raises(ValueError, match="x has 60 columns"):
        quantized_linear(torch.zeros(2, 60, device=DEVICE), weight, out=torch.zeros(2, 5, device=DEVICE))
    with pytest.raises(ValueError, match="out has shape"):
        quantized_linear(torch.zeros(2, 64, device=DEVICE), weight, out=torch.zeros(2, 6, device=DEVICE))
    with pytest.raises(ValueError, match="a multiple of the tile"), small("quantized_linear", 24):
        quantized_linear(torch.zeros(2, 64, device=DEVICE), weight, out=torch.zeros(2, 5, device=DEVICE))
    with pytest.raises(ValueError, match="dy has shape"):
        quantized_linear_backward(torch.zeros(2, 6, device=DEVICE), weight, out=torch.zeros(2, 64, device=DEVICE))
