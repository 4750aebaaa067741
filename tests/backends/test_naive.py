"""`naive` against autograd in float64, and every other backend against `naive`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedgrad import backends
from embedgrad.backends.base import Backend
from embedgrad.backends.mask import TreeMask
from embedgrad.backends.naive import OPS as naive
from embedgrad.maths.optimizer import AdamW
from embedgrad.maths.trust_region import CosineCone, cosine_similarity
from embedgrad.util.errors import BackendError
from tests.kernels.harness import DEVICE, normal
from tests.kernels.trees import Tree, trees

F64, F32 = torch.float64, torch.float32
SEEDS = st.integers(0, 2**31)
quick = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


def available() -> list[Backend]:
    """Every backend that computes in float32 here."""
    found = []
    for name in ("reference", "native", "triton"):
        try:
            found.append(backends.choose(name, DEVICE, F32))
        except BackendError:
            continue
    return found


ALL = pytest.mark.parametrize("ops", available(), ids=lambda ops: ops.name)


class Matrix:
    """A head of one stored part."""

    def __init__(self, w: Tensor) -> None:
        self.parts, self.shape = [w], tuple(w.shape)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.mm(x, self.parts[0].T, out=out)

    def backward(self, dy: Tensor, out: Tensor) -> Tensor:
        return torch.mm(dy, self.parts[0], out=out)


def mask_of(tree: Tree) -> TreeMask:
    s = tree.schedule()
    positions = (None if s.query_position is None else s.query_position.long(), s.key_position)
    return TreeMask(s.key_begin, s.key_end, s.query_index, s.prefix, s.window, *positions)


def autograd(forward: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(forward(*leaves), leaves, dy)


def wide(seed: int, *shape: int) -> Tensor:
    return normal(seed, shape).double()


def near(found: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """No farther from the truth than `naive` in float32, but for a few roundings of numbers of size 1."""
    for each, plainly, right in zip(found, plain, truth, strict=True):
        finite = right.isfinite()
        assert torch.equal(each[~finite].double(), right[~finite])
        error, allowed = ((x[finite].double() - right[finite]).abs() for x in (each, plainly))
        size = right[finite].abs().max() if right[finite].numel() else torch.zeros(())
        assert not error.numel() or float(error.max()) <= float(allowed.max()) + 5e-6 * max(1.0, float(size))


@quick
@given(SEEDS, st.integers(1, 5), st.integers(1, 9))
def test_row_wise_gradients_are_autograds(seed: int, rows: int, half: int) -> None:
    x, dy, w = wide(seed, rows, 2 * half), wide(seed + 1, rows, 2 * half), wide(seed + 2, 2 * half)
    plainly = autograd(lambda x: torch.nn.functional.rms_norm(x, (2 * half,), w, 1e-6), dy, x)[0]
    torch.testing.assert_close(naive.rms_norm_backward(dy, x, w, 1e-6, dx=torch.ones_like(x)), plainly + 1)
    gate_up, da = wide(seed + 3, rows, 2 * half), wide(seed + 4, rows, half)
    plainly = autograd(lambda x: torch.nn.functional.silu(x[:, :half]) * x[:, half:], da, gate_up)[0]
    torch.testing.assert_close(naive.swiglu_backward(da, gate_up, out=torch.empty_like(gate_up)), plainly)

    def geglu(x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x[:, :half], approximate="tanh") * x[:, half:]

    torch.testing.assert_close(naive.swiglu(gate_up, out=torch.empty_like(da), gelu=True), geglu(gate_up))
    plainly = autograd(geglu, da, gate_up)[0]
    torch.testing.assert_close(naive.swiglu_backward(da, gate_up, out=torch.empty_like(gate_up), gelu=True), plainly)


@quick
@given(SEEDS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.booleans())
def test_the_rotations_gradient_is_autograds(seed: int, rows: int, h: int, g: int, normed: bool) -> None:
    heads, angle = (h, g, 6), wide(seed, rows, 3)
    qkv, dy = wide(seed + 1, rows, (h + 2 * g) * 6), wide(seed + 2, rows, (h + 2 * g) * 6)
    norms = {"q_norm": wide(seed + 3, 6), "k_norm": wide(seed + 4, 6), "eps": 1e-6} if normed else {}

    def rotated(x: Tensor) -> Tensor:
        pieces = [*x.unflatten(1, (-1, 6)).unbind(1)]
        for i in range(h + g):
            if normed:
                pieces[i] = torch.nn.functional.rms_norm(pieces[i], (6,), norms["q_norm" if i < h else "k_norm"], 1e-6)
            a, b = pieces[i].chunk(2, 1)
            pieces[i] = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)
        return torch.cat(pieces, 1)

    found = naive.rope(qkv.clone(), angle.cos(), angle.sin(), heads, **norms)
    torch.testing.assert_close(found, rotated(qkv))
    found = naive.rope_backward(dy.clone(), qkv, angle.cos(), angle.sin(), heads, **norms)
    torch.testing.assert_close(found, autograd(rotated, dy, qkv)[0])


@quick
@given(trees(), SEEDS, st.sampled_from([(1, 1), (4, 2)]), st.sampled_from([None, 1.5]))
def test_attentions_gradient_is_autograds(tree: Tree, seed: int, heads: tuple[int, int], softcap: float | None) -> None:
    mask, (h, g) = mask_of(tree), heads
    visible = mask.visible()
    n, s = visible.shape
    q, k, v, do = wide(seed, n, h, 8), wide(seed + 1, s, g, 8), wide(seed + 2, s, g, 8), wide(seed + 3, n, h, 8)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(h // g, dim=1) for x in (k, v))
        z = 0.3 * torch.einsum("nhd,shd->hns", q, k)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        empty = ~visible.any(1)
        p = z.masked_fill(~(visible | empty[:, None]), float("-inf")).softmax(2).masked_fill(empty[:, None], 0.0)
        return torch.einsum("hns,shd->nhd", p, v)

    o, lse = torch.empty_like(q), torch.empty(n, h, dtype=F64, device=DEVICE)
    naive.tree_attention(q, k, v, mask, scale=0.3, softcap=softcap, out=o, lse=lse)
    torch.testing.assert_close(o, dense(q, k, v))
    assert torch.equal(lse == float("-inf"), ~visible.any(1)[:, None].expand(n, h))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k[mask.prefix :], v[mask.prefix :]))
    naive.tree_attention_backward(do, q, k, v, o, lse, mask, scale=0.3, softcap=softcap, dq=dq, dk=dk, dv=dv)
    plainly = autograd(dense, do, q, k, v)
    for found, expected, first in zip((dq, dk, dv), plainly, (0, mask.prefix, mask.prefix), strict=True):
        torch.testing.assert_close(found, expected[first:], atol=1e-10, rtol=1e-8)


@quick
@given(SEEDS, st.integers(1, 5), st.sampled_from([None, 2.0]))
def test_the_losss_gradient_is_autograds(seed: int, count: int, softcap: float | None) -> None:
    h, w, targets, weights = wide(seed, count, 6), wide(seed + 1, 11, 6), torch.arange(count) - 1, wide(seed + 2, count)
    targets = targets.to(DEVICE)

    def loss(h: Tensor) -> Tensor:
        z = h @ w.T
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return torch.nn.functional.cross_entropy(z, targets, ignore_index=-1, reduction="none")

    dh = torch.empty_like(h)
    nll, predicted = naive.linear_cross_entropy(h, Matrix(w), targets, weights, softcap=softcap, dh=dh)
    torch.testing.assert_close(nll, loss(h))
    torch.testing.assert_close(dh, autograd(loss, weights, h)[0])
    assert torch.equal(predicted, (h @ w.T).argmax(1))


@ALL
@quick
@given(tree=trees(), seed=SEEDS, heads=st.sampled_from([(1, 1), (4, 2)]))
def test_attention_of_every_backend(ops: Backend, tree: Tree, seed: int, heads: tuple[int, int]) -> None:
    mask, (h, g) = mask_of(tree), heads
    n, s = len(mask.query_index), len(mask.key_begin)
    inputs = [normal(seed, (n, h, 16)), normal(seed + 1, (s, g, 16)), normal(seed + 2, (s, g, 16))]
    do = normal(seed + 3, (n, h, 16))

    def both(ops: Backend, dtype: torch.dtype) -> list[Tensor]:
        q, k, v, grad = (x.to(dtype) for x in (*inputs, do))
        o, lse = torch.empty_like(q), torch.empty(n, h, dtype=dtype, device=DEVICE)
        ops.tree_attention(q, k, v, mask, scale=0.25, out=o, lse=lse)
        found = [torch.empty_like(x) for x in (q, k[mask.prefix :], v[mask.prefix :])]
        dq, dk, dv = found
        ops.tree_attention_backward(grad, q, k, v, o, lse, mask, scale=0.25, dq=dq, dk=dk, dv=dv)
        return [o, *found]

    near(both(ops, F32), both(naive, F32), both(naive, F64))


@ALL
@quick
@given(seed=SEEDS, rows=st.integers(1, 5), half=st.integers(1, 9))
def test_row_wise_ops_of_every_backend(ops: Backend, seed: int, rows: int, half: int) -> None:
    width, heads, angle = 2 * half, (2, 1, 2 * half), normal(seed + 4, (rows, half))
    x, dy, w = normal(seed, (rows, width)), normal(seed + 1, (rows, width)), normal(seed + 2, (width,))
    qkv, da = normal(seed + 3, (rows, 4 * width)), normal(seed + 5, (rows, half))
    rows_, table = normal(seed + 6, (3, width)), normal(seed + 7, (5, width))
    ids, shown = (torch.arange(rows, device=DEVICE) % n for n in (5, 4))

    def every(ops: Backend, dtype: torch.dtype) -> list[Tensor]:
        x_, dy_, w_, qkv_, da_, r_, t_ = (t.to(dtype) for t in (x, dy, w, qkv, da, rows_, table))
        cos, sin = angle.to(dtype).cos(), angle.to(dtype).sin()
        return [
            ops.rms_norm(x_, w_, 1e-6, out=torch.empty_like(x_)),
            ops.rms_norm_backward(dy_, x_, w_, 1e-6, dx=torch.ones_like(x_)),
            ops.rope(qkv_.clone(), cos, sin, heads, q_norm=w_, k_norm=w_, eps=1e-6),
            ops.rope_backward(qkv_.clone(), qkv_ + 1, cos, sin, heads, q_norm=w_, k_norm=w_, eps=1e-6),
            ops.swiglu(x_, out=torch.empty(rows, half, dtype=dtype, device=DEVICE)),
            ops.swiglu_backward(da_, x_, out=torch.empty_like(x_)),
            ops.swiglu(x_, out=torch.empty(rows, half, dtype=dtype, device=DEVICE), gelu=True),
            ops.swiglu_backward(da_, x_, out=torch.empty_like(x_), gelu=True),
            ops.embed(r_, t_, ids, shown - 1, out=torch.empty_like(x_)),
            ops.embed_backward(x_, shown - 1, grad=torch.empty(3, width, dtype=dtype, device=DEVICE)),
        ]

    near(every(ops, F32), every(naive, F32), every(naive, F64))


@ALL
@quick
@given(seed=SEEDS, count=st.integers(1, 6), batch=st.integers(1, 3), lengths=st.lists(st.integers(0, 4), min_size=3))
def test_loss_and_decoding_of_every_backend(
    ops: Backend, seed: int, count: int, batch: int, lengths: list[int]
) -> None:
    h, w, weights = normal(seed, (count, 16)), normal(seed + 1, (37, 16)), normal(seed + 2, (count,)).abs()
    targets = torch.arange(count, device=DEVICE) - 1
    q, pk, pv = normal(seed + 3, (batch, 4, 16)), normal(seed + 4, (3, 2, 16)), normal(seed + 5, (3, 2, 16))
    ok, ov = normal(seed + 6, (batch, 5, 2, 16)), normal(seed + 7, (batch, 5, 2, 16))
    own = torch.tensor(lengths[:batch], dtype=torch.int64, device=DEVICE)

    def every(ops: Backend, dtype: torch.dtype) -> list[Tensor]:
        dh = torch.empty(count, 16, dtype=dtype, device=DEVICE)
        head: Any = Matrix(w.to(dtype))
        nll, _ = ops.linear_cross_entropy(h.to(dtype), head, targets, weights.to(dtype), dh=dh)
        q_, *kept = (x.to(dtype) for x in (q, pk, pv, ok, ov))
        return [nll, dh, ops.decode_attention(q_, *kept, own, scale=0.25, out=torch.empty_like(q_))]

    near(every(ops, F32), every(naive, F32), every(naive, F64))


@pytest.mark.parametrize("ops", [naive, *available()], ids=lambda ops: ops.name)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=SEEDS, tau=st.sampled_from([0.95, 0.5, 0.0, -0.5, 0.999, 0.99999]), k=st.integers(1, 5), d=st.integers(2, 70),
    spread=st.sampled_from([0.02, 0.3, 2.0]),
)  # fmt: skip
def test_a_measured_cosine_is_never_below_tau(
    ops: Backend, seed: int, tau: float, k: int, d: int, spread: float
) -> None:
    """No tolerance: every backend puts a row as far inside as rounding could undo. A row sent to 0 has no direction."""
    anchor, g = normal(seed, (k, d)), normal(seed + 1, (k, d))
    e, m, v = anchor + spread * normal(seed + 2, (k, d)), torch.zeros_like(g), torch.zeros_like(g)
    report = ops.prompt_step(e, anchor, m, v, g, factors=AdamW().factors(1, 0.1), region=CosineCone(tau))
    similar = cosine_similarity(e, anchor)
    assert bool(((similar >= tau) | (e == 0).all(1)).all())
    torch.testing.assert_close(report.similarity, similar, atol=1e-12, rtol=0)
