"""Dequantised matrices: every bit of what `PackedWeight.dequantize` gives."""

import pytest
import torch
from embedgrad.kernels import launch
from embedgrad.kernels.dequantize import dequantize
from embedgrad.kernels.packing import quantize_int8
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .harness import FLOAT_TYPES, awkward_sizes, check_canaries, equal_bits, guarded, normal, same_bits
from .test_quantized_linear import FORMS, SEEDS, weight_of


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    SEEDS, awkward_sizes(1, 40), awkward_sizes(1, 200), FORMS, st.sampled_from([(32, 16), (32, 64), (64, 64), (8, 32)]),
    st.sampled_from(FLOAT_TYPES), st.sampled_from([0, 5]),
)  # fmt: skip
@example(0, 3, 100, "int4", (32, 64), torch.float32, 5)
def test_dequantize(seed: int, n: int, k: int, form: str, group: tuple[int, int], dtype: torch.dtype, gap: int) -> None:
    weight = weight_of(form, seed, n, k, group[0])

    def run() -> Tensor:
        out = guarded((n, k), dtype, strides=(k + gap, 1))
        with launch.overridden("dequantize", BLOCK_N=16, BLOCK_K=group[1], num_warps=1):
            return dequantize(weight, out=out)

    assert equal_bits(same_bits(run), weight.dequantize(dtype))
    check_canaries()


def test_refusals() -> None:
    weight = quantize_int8(normal(0, (5, 64)))[0]
    with pytest.raises(ValueError, match="out has shape"):
        dequantize(weight, out=guarded((5, 63)))
    with pytest.raises(ValueError, match="contiguous rows"):
        dequantize(weight, out=guarded((5, 64), strides=(1, 5)))
    with (
        pytest.raises(ValueError, match="must divide one another"),
        launch.overridden("dequantize", BLOCK_K=48),
    ):
        dequantize(weight, out=guarded((5, 64)))
