"""SwiGLU and its backward against fp64."""

import pytest
import torch
from embedgrad.kernels import launch
from embedgrad.kernels.swiglu import swiglu, swiglu_backward
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

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**31)
SCALES = st.sampled_from([1.0, 30.0, 1e4])


def plain(gate_up: Tensor, gelu: bool = False) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    f = torch.nn.functional
    return (f.gelu(gate, approximate="tanh") if gelu else f.silu(gate)) * up


def plain_backward(da: Tensor, gate_up: Tensor, gelu: bool = False) -> Tensor:
    x = gate_up.detach().clone().requires_grad_()
    plain(x, gelu).backward(da)
    assert x.grad is not None
    return x.grad


@QUICK
@given(
    SEEDS, awkward_sizes(1, 6), awkward_sizes(1, 50), st.sampled_from(FLOAT_TYPES), SCALES, layouts(),
    layouts(expanded=False), st.booleans(),
)  # fmt: skip
@example(0, 1, 1, torch.float32, 1e4, "contiguous", "contiguous", False)
@example(0, 1, 1, torch.float32, 1e4, "contiguous", "contiguous", True)
def test_swiglu(
    seed: int, rows: int, width: int, dtype: torch.dtype, scale: float, layout: Layout, out_layout: Layout, gelu: bool
) -> None:
    values = normal(seed, (rows, 2 * width))
    values[:, :width] *= scale
    gate_up = laid_out(values.to(dtype), layout)

    def run() -> Tensor:
        out = guarded((rows, width), dtype, strides=strides_of((rows, width), out_layout))
        with launch.overridden("swiglu", BLOCK=16):
            return swiglu(gate_up, out=out, gelu=gelu)

    three_way(same_bits(run), plain(gate_up, gelu), plain(gate_up.double(), gelu))
    check_canaries()


@QUICK
@given(
    SEEDS, awkward_sizes(1, 6), awkward_sizes(1, 50), st.sampled_from(FLOAT_TYPES), SCALES, layouts(), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_swiglu_backward(
    seed: int, rows: int, width: int, dtype: torch.dtype, scale: float, layout: Layout, in_place: bool, gelu: bool
) -> None:
    values = normal(seed, (rows, 2 * width))
    values[:, :width] *= scale
    gate_up, da = values.to(dtype), normal(seed + 1, (rows, width), dtype)
    da = laid_out(da, layout)

    def run() -> Tensor:
        source, gradient = laid_out(gate_up, "wide_rows"), guarded_copy(da)
        out = source if in_place else guarded((rows, 2 * width), dtype)
        with launch.overridden("swiglu_backward", BLOCK=16):
            return swiglu_backward(gradient, source, out=out, gelu=gelu)

    out = same_bits(run)
    truth = plain_backward(da.double(), gate_up.double(), gelu)
    # plain torch in fp32, rounded once, as the kernel is: its fp16 arithmetic would be the weaker judge
    three_way(out, plain_backward(da.float(), gate_up.float(), gelu).to(dtype), truth)
    check_canaries()


def test_the_casts_are_where_transformers_has_them() -> None:
    """Bits equal but for a last bit of σ; without the rounding of g σ(g) many elements would differ."""
    gate_up = guarded_copy(normal(0, (20, 120), torch.float16))
    out = swiglu(gate_up, out=guarded((20, 60), torch.float16))
    assert float((out != plain(gate_up)).float().mean()) < 0.02


def test_extreme_gates_are_finite() -> None:
    gate_up = torch.tensor([[-1e4, 1e4, -100.0, 100.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    out = swiglu(guarded_copy(gate_up), out=guarded((1, 5)))
    assert torch.equal(out, torch.tensor([[0.0, 1e4, 0.0, 100.0, 0.0]], device=DEVICE))
    grad = swiglu_backward(torch.ones(1, 5, device=DEVICE), guarded_copy(gate_up), out=guarded((1, 10)))
    assert torch.equal(grad[0, :5], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5], device=DEVICE))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="halves"):
        swiglu(torch.zeros(2, 5), out=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="out has shape"):
        swiglu(torch.zeros(2, 6), out=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="is expanded"):
        swiglu_backward(torch.zeros(2, 3), torch.zeros(2, 6), out=torch.zeros(1, 6).expand(2, 6))
