"""Rotation and qk-norm on the fused buffer, and their transpose, against fp64."""

import pytest
import torch
from embedgrad.kernels import launch
from embedgrad.kernels.rope import rope, rope_backward
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .harness import (
    DEVICE,
    FLOAT_TYPES,
    Layout,
    check_canaries,
    guarded_copy,
    laid_out,
    layouts,
    normal,
    same_bits,
    three_way,
)

EPS = 1e-6
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**31)
HEADS = st.tuples(st.integers(0, 5), st.integers(0, 3), st.sampled_from([2, 6, 8, 10, 16])).filter(
    lambda h: h[0] + h[1]
)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] as transformers' apply_rotary_pos_emb turns it."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * torch.cat([cos, cos], -1)[:, None] + turned * torch.cat([sin, sin], -1)[:, None]


def normed(x: Tensor, weight: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain(qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int], norms: list[Tensor]) -> Tensor:
    h, g, size = heads
    parts = list(qkv.split([h * size, g * size, g * size], dim=1))
    for i in range(2):
        x = parts[i].unflatten(1, (-1, size)) if parts[i].shape[1] else parts[i].reshape(len(qkv), 0, size)
        x = normed(x, norms[i]) if norms else x
        parts[i] = rotated(x, cos.to(x.dtype), sin.to(x.dtype)).flatten(1)
    return torch.cat(parts, dim=1)


def angles(seed: int, tokens: int, half: int) -> tuple[Tensor, Tensor]:
    """cos and sin of any positions, in no order."""
    at = torch.randint(0, 5000, (tokens, 1), generator=torch.Generator().manual_seed(seed), device="cpu").double()
    angle = at / 10000 ** (torch.arange(half, device="cpu").double() / max(half, 1))
    return angle.cos().float().to(DEVICE), angle.sin().float().to(DEVICE)


@QUICK
@given(
    SEEDS, st.integers(1, 4), HEADS, st.sampled_from(FLOAT_TYPES), st.booleans(), st.sampled_from([2, 4, 16]), layouts()
)
@example(0, 3, (5, 0, 6), torch.float32, True, 2, "transposed")
@example(0, 3, (0, 3, 6), torch.float16, True, 2, "contiguous")
def test_rope(
    seed: int, tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, norm: bool, block: int, layout: Layout
) -> None:
    h, g, size = heads
    width = (h + 2 * g) * size
    x = normal(seed, (tokens, width), dtype)
    cos, sin = (laid_out(a, layout) for a in angles(seed, tokens, size // 2))
    norms = [guarded_copy(normal(seed + i, (size,), dtype)) for i in (1, 2)] if norm else []
    given_norms = {"q_norm": norms[0], "k_norm": norms[1], "eps": EPS} if norm else {}

    def run() -> Tensor:
        qkv = laid_out(x, "wide_rows")
        with launch.overridden("rope", BLOCK_H=block):
            return rope(qkv, cos, sin, heads, **given_norms)  # type: ignore[arg-type]

    out = same_bits(run)
    truth = plain(x.double(), cos.double(), sin.double(), heads, [w.double() for w in norms])
    three_way(out, plain(x, cos, sin, heads, norms), truth)
    assert torch.equal(out[:, (h + g) * size :], x[:, (h + g) * size :])
    check_canaries()


@QUICK
@given(
    SEEDS, st.integers(1, 4), HEADS, st.sampled_from(FLOAT_TYPES), st.booleans(), st.sampled_from([2, 16]), layouts()
)
@example(0, 3, (5, 0, 6), torch.float32, True, 2, "expanded")
def test_rope_backward(
    seed: int, tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, norm: bool, block: int, layout: Layout
) -> None:
    h, g, size = heads
    width = (h + 2 * g) * size
    dy = normal(seed, (tokens, width), dtype)
    raw = laid_out(normal(seed + 5, (tokens, width), dtype), layout)
    cos, sin = angles(seed, tokens, size // 2)
    norms = [normal(seed + i, (size,), dtype) for i in (1, 2)] if norm else []
    given_norms = {"q_norm": norms[0], "k_norm": norms[1], "eps": EPS} if norm else {}

    def run() -> Tensor:
        with launch.overridden("rope_backward", BLOCK_H=block):
            grad = laid_out(dy, "wide_rows")
            return rope_backward(grad, raw if norm else None, cos, sin, heads, **given_norms)  # type: ignore[arg-type]

    def gradient(wide: torch.dtype) -> Tensor:
        x = raw.detach().to(wide).requires_grad_()
        y = plain(x, cos.to(wide), sin.to(wide), heads, [w.to(wide) for w in norms])
        (found,) = torch.autograd.grad(y, x, dy.to(wide))
        return found

    out = same_bits(run)
    three_way(out, gradient(torch.float32).to(dtype), gradient(torch.float64))
    check_canaries()


def test_backward_is_the_transpose_of_forward() -> None:
    heads, (cos, sin) = (3, 1, 8), angles(3, 5, 4)
    x, y = normal(0, (5, 40)), normal(1, (5, 40))
    forward = rope(guarded_copy(x), cos, sin, heads)
    backward = rope_backward(guarded_copy(y), None, cos, sin, heads)
    assert abs(float((forward.double() * y).sum() - (x.double() * backward).sum())) < 1e-4


@QUICK
@given(SEEDS, st.integers(1, 5), HEADS, st.sampled_from(FLOAT_TYPES), st.booleans(), st.sampled_from([2, 16]))
@example(0, 3, (0, 3, 6), torch.bfloat16, True, 2)
def test_the_launch_that_fills_the_cache(
    seed: int, tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, norm: bool, block: int
) -> None:
    h, g, size = heads
    x, (cos, sin) = normal(seed, (tokens, (h + 2 * g) * size), dtype), angles(seed, tokens, size // 2)
    norms = [normal(seed + i, (size,), dtype) for i in (1, 2)] if norm else []
    given_norms = {"q_norm": norms[0], "k_norm": norms[1], "eps": EPS} if norm else {}
    draw = torch.Generator().manual_seed(seed)
    slots = torch.randperm(tokens + 3, generator=draw, device="cpu")[:tokens].to(DEVICE)
    before = normal(seed + 9, (2, tokens + 3, g, size), dtype)
    keys, values = guarded_copy(before[0]), guarded_copy(before[1])
    with launch.overridden("rope", BLOCK_H=block):
        alone = rope(guarded_copy(x), cos, sin, heads, **given_norms)  # type: ignore[arg-type]
        out = rope(guarded_copy(x), cos, sin, heads, cache=(keys, values, slots), **given_norms)  # type: ignore[arg-type]
    assert torch.equal(out, alone)
    expected = before.clone()
    expected[0, slots] = out[:, h * size : (h + g) * size].unflatten(1, (g, size))
    expected[1, slots] = x[:, (h + g) * size :].unflatten(1, (g, size))
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
    check_canaries()


def test_refusals() -> None:
    x, half = torch.zeros(2, 24), torch.zeros(2, 3)
    rows, slots = torch.zeros(5, 1, 6), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="keys has shape"):
        rope(x, half, half, (2, 1, 6), cache=(torch.zeros(5, 2, 6), rows, slots))
    with pytest.raises(ValueError, match=r"values are torch\.float16"):
        rope(x, half, half, (2, 1, 6), cache=(rows, rows.half(), slots))
    with pytest.raises(ValueError, match="slots are"):
        rope(x, half, half, (2, 1, 6), cache=(rows, rows, slots.float()))
    with pytest.raises(ValueError, match="even"):
        rope(torch.zeros(2, 20), half, half, (2, 1, 5))
    with pytest.raises(ValueError, match="cos has shape"):
        rope(x, torch.zeros(2, 4), half, (2, 1, 6))
    with pytest.raises(ValueError, match="given together"):
        rope(x, half, half, (2, 1, 6), q_norm=torch.zeros(6))
    with pytest.raises(ValueError, match="qkv_raw"):
        rope_backward(x, None, half, half, (2, 1, 6), q_norm=torch.zeros(6), k_norm=torch.zeros(6))
