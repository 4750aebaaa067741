"""RMS norm and its backward against fp64."""

import pytest
import torch
from embedgrad.kernels import launch
from embedgrad.kernels.rms_norm import WIDEST, rms_norm, rms_norm_backward
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

EPS = 1e-5
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
BLOCKS = st.sampled_from([128, 256])
SCALES = st.sampled_from([1.0, 1e-4, 1e3])
SEEDS = st.integers(0, 2**31)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' LlamaRMSNorm computes it."""
    wide = x if x.dtype == torch.float64 else x.float()
    hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return hat.to(x.dtype) * weight


def plain_backward(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
    wide.requires_grad_()
    (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).backward(dy.to(wide.dtype) * weight.to(wide.dtype))
    assert wide.grad is not None
    return wide.grad


@QUICK
@given(
    SEEDS, awkward_sizes(1, 7), awkward_sizes(1, 70), st.sampled_from(FLOAT_TYPES), BLOCKS, SCALES, layouts(),
    layouts(), layouts(expanded=False),
)  # fmt: skip
@example(0, 2, 64, torch.float32, 128, 1.0, "expanded", "contiguous", "transposed")
def test_rms_norm(
    seed: int, rows: int, width: int, dtype: torch.dtype, block: int, scale: float, layout: Layout, w_layout: Layout,
    out_layout: Layout,
) -> None:  # fmt: skip
    x = laid_out(normal(seed, (rows, width), dtype, scale), layout)
    weight = laid_out(normal(seed + 1, (width,), dtype), "stepped" if w_layout == "stepped" else "contiguous")

    def run() -> Tensor:
        out = guarded((rows, width), dtype, strides=strides_of((rows, width), out_layout))
        with launch.overridden("rms_norm", BLOCK=block):
            return rms_norm(x, weight, EPS, out=out)

    out = same_bits(run)
    three_way(out, plain(x, weight), plain(x.double(), weight.double()))
    check_canaries()


@QUICK
@given(
    SEEDS, awkward_sizes(1, 7), awkward_sizes(1, 70), st.sampled_from(FLOAT_TYPES), BLOCKS, SCALES, layouts(), layouts()
)
@example(0, 3, 33, torch.float16, 128, 1.0, "expanded", "transposed")
def test_rms_norm_backward(
    seed: int, rows: int, width: int, dtype: torch.dtype, block: int, scale: float, dy_layout: Layout, layout: Layout
) -> None:
    dy = laid_out(normal(seed, (rows, width), dtype), dy_layout)
    x = laid_out(normal(seed + 1, (rows, width), dtype, scale), layout)
    weight = guarded_copy(normal(seed + 2, (width,), dtype))
    before = normal(seed + 3, (rows, width), dtype, 1 / scale)

    def run() -> Tensor:
        dx = laid_out(before, "wide_rows")
        with launch.overridden("rms_norm_backward", BLOCK=block):
            return rms_norm_backward(dy, x, weight, EPS, dx=dx)

    dx = same_bits(run)
    truth = before.double() + plain_backward(dy.double(), x.double(), weight.double())
    terms = (weight.double() * dy.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + EPS)).norm()
    cancelled = max(1.0, float(terms / truth.norm()))  # r·w·dy less its part along x̂: all of it, where width is 1
    plainly = before + plain_backward(dy, x, weight).to(dtype)
    three_way(dx, plainly, truth, tolerance=TOLERANCE[dtype] * cancelled)
    check_canaries()


def test_the_casts_are_where_transformers_has_them() -> None:
    """Bits equal but for a last bit of r; without the rounding of x̂ a quarter of the elements would differ."""
    x, weight = guarded_copy(normal(0, (20, 60), torch.float16)), guarded_copy(normal(1, (60,), torch.float16))
    out = rms_norm(x, weight, EPS, out=guarded((20, 60), torch.float16))
    assert float((out != plain(x, weight)).float().mean()) < 0.02


def test_a_float32_weight_multiplies_before_the_rounding() -> None:
    """As Gemma's and OLMo 2's norms; bits equal but for a last bit of r."""
    x, weight = guarded_copy(normal(0, (20, 60), torch.float16)), guarded_copy(normal(1, (60,)))
    out = rms_norm(x, weight, EPS, out=guarded((20, 60), torch.float16))
    wide = x.float()
    right = (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + EPS) * weight).to(torch.float16)
    assert float((out != right).float().mean()) < 0.02


def test_a_weight_of_another_type_and_no_rows() -> None:
    x, weight = normal(0, (3, 20), torch.float16), normal(1, (20,))
    out = rms_norm(x, weight, EPS, out=guarded((3, 20)))
    three_way(out, plain(x, weight), plain(x.double(), weight.double()), tolerance=2.0**-11)
    assert rms_norm(x[:0], weight, EPS, out=guarded((0, 20))).shape == (0, 20)


def test_a_row_of_zeros_and_a_huge_row() -> None:
    x = torch.tensor([0.0, 6e4, 1e-7], device=DEVICE)[:, None].expand(3, 40).half().contiguous()
    w = torch.ones(40, dtype=torch.float16, device=DEVICE)
    out = rms_norm(guarded_copy(x), w, EPS, out=guarded((3, 40), torch.float16))
    three_way(out, plain(x, w), plain(x.double(), w.double()), by="element")


def test_refusals() -> None:
    x = torch.zeros(3, 8)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(x, torch.zeros(7), EPS, out=torch.zeros(3, 8))
    with pytest.raises(ValueError, match="is expanded"):
        rms_norm_backward(x, x, torch.zeros(8), EPS, dx=torch.zeros(1, 8).expand(3, 8))
    with pytest.raises(ValueError, match=r"float64"):
        rms_norm(x.double(), torch.zeros(8), EPS, out=torch.zeros(3, 8))
    wide = torch.zeros(1, WIDEST + 1)
    with pytest.raises(ValueError, match=f"at most {WIDEST}"):
        rms_norm(wide, wide[0], EPS, out=wide.clone())
