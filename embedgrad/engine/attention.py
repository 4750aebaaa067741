"""Attention of one frozen block, forward and backward: x → x₁ and dx₁ → dx (docs/design.md, section 4).

Shapes: T packed tokens, Nq query rows (T, or the R predicting tokens in the last layer), S keys (the prefix's in front
of the tree's own T), P tokens that show a prompt row, d width, H query heads over G key/value heads of size D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from embedgrad.backends.base import Backend, CacheRows, Heads, split_keys
from embedgrad.engine.arena import Arena
from embedgrad.model.config import ModelConfig
from embedgrad.model.frozen import FrozenMatrix
from embedgrad.model.weights import LayerWeights

Take = Callable[..., Tensor]
"""`Arena.keep` or `Arena.scratch`."""


class Pass(Protocol):
    """What attention needs of a pass: rotations, and which keys its queries meet."""

    def rotation(self, index: int) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D/2] of layer `index`."""

    def cache_rows(self, index: int) -> CacheRows | None:
        """Where layer `index` stores the keys and values of the pass's own tokens; None: nowhere."""

    def attend(self, attention: Attention, index: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> None:
        """o [Nq, H, D] and lse [Nq, H] of q [Nq, H, D] over what it sees of k, v [T, G, D] and of earlier keys."""

    def attend_backward(
        self, attention: Attention, index: int, do: Tensor, saved: Projections, o: Tensor, lse: Tensor,
        wanted: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> None:  # fmt: skip
        """dq at the query rows, dk and dv at the own keys; at the tokens `wanted` only where that is given."""


@dataclass(frozen=True)
class Projection:
    """One product with h₁: its output [n, (H + 2G)·D] after norm and rotation, what q and k were before (with qk-norm
    only), and the tokens that its n rows belong to (None: all)."""

    matrix: FrozenMatrix
    heads: Heads
    rows: Tensor | None
    out: Tensor
    raw: Tensor | None

    @property
    def queries(self) -> Tensor:
        """[n, H, D]."""
        h, _, size = self.heads
        return self.out[:, : h * size].unflatten(1, (h, size))

    @property
    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """[n, G, D] each."""
        return split_keys(self.out, self.heads)


Projections = list[Projection]
"""One that holds q, k and v; or, where fewer queries are wanted than keys, k and v in the first and q in the second."""


@dataclass(frozen=True)
class SavedAttention:
    """What the backward pass reads. `x1_mark`: where x₁ begins in the arena, behind the rest.

    y: o W_oᵀ, where a norm stands behind it; else None.
    """

    projections: Projections
    o: Tensor  # [Nq, H·D]
    lse: Tensor  # [Nq, H]
    x1: Tensor  # [Nq, d]
    x1_mark: int
    y: Tensor | None  # [Nq, d]


class Attention:
    """The attention of every block of a model on one backend."""

    def __init__(self, config: ModelConfig, ops: Backend, dtype: torch.dtype, arena: Arena) -> None:
        self.config, self.ops, self.dtype, self.arena = config, ops, dtype, arena
        self.sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.heads: Heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        self.scale, self.softcap = config.scale, config.attention_softcap
        self.behind = config.kind.norms[1] is not None or config.residual_scale != 1
        self.wide_qk_norm = config.qk_norm and config.kind.wide_qk_norm

    def forward(
        self, index: int, w: LayerWeights, x: Tensor, p: Pass, rows: Tensor | None, *, keep: frozenset[str]
    ) -> SavedAttention:
        """x₁ = x + m·norm(o W_oᵀ) at the tokens `rows` (None: all). What `keep` names is taken from the arena's bottom.

        Most families have neither the norm nor the multiplier m.
        """
        arena, (h, _, size) = self.arena, self.heads
        projections = self.project(index, w, x, p, self._plan(w, rows), arena.keep if "qkv" in keep else arena.scratch)
        q, (k, v) = projections[-1].queries, projections[0].keys_and_values
        take = arena.keep if "o" in keep else arena.scratch
        o = take(len(q), h * size, dtype=self.dtype)
        lse = take(len(q), h, dtype=self.sum_dtype)
        y = None
        if w.attention_post_norm is not None:
            y = take(len(q), x.shape[1], dtype=self.dtype)
        x1_mark = arena.mark()
        x1 = (arena.keep if "x1" in keep else arena.scratch)(len(q), x.shape[1], dtype=self.dtype)
        with arena.frame():
            p.attend(self, index, q, k, v, o.view(-1, h, size), lse)  # (3)
            if self.behind:
                branch = arena.scratch(*x1.shape, dtype=self.dtype) if y is None else y
                w.out.forward(o, out=branch)
                self.add_branch(branch, w.attention_post_norm, self.at(rows, x), out=x1)  # (4)
            else:
                w.out.forward(o, out=x1, add=self.at(rows, x))  # (4)
        return SavedAttention(projections, o, lse, x1, x1_mark, y)

    def keys_only(self, index: int, w: LayerWeights, x: Tensor, p: Pass) -> None:
        """Only the keys and values that `p.cache_rows` wants, for a last layer whose output nobody reads."""
        _, g, size = self.heads
        self.project(index, w, x, p, [(w.kv, (0, g, size), None)], self.arena.scratch)

    def backward(
        self, index: int, w: LayerWeights, x: Tensor, saved: SavedAttention, dx1: Tensor, p: Pass,
        *, wanted: Tensor | None, dx: Tensor,
    ) -> Tensor:  # fmt: skip
        """dx += the gradient of x₁ with respect to x through attention, from dx₁ [Nq, d].

        wanted: the tokens whose dx is asked for (None: all). dx [T or P, d] holds dx₁ at these tokens already.
        """
        ops, arena, (h, _, size) = self.ops, self.arena, self.heads
        with arena.frame():
            grads = [self._like(projection, wanted) for projection in saved.projections]
            with arena.frame():
                do = arena.scratch(len(dx1), h * size, dtype=self.dtype)
                dy = self.branch_gradient(dx1, saved.y, w.attention_post_norm) if self.behind else dx1
                w.out.backward(dy, out=do)  # (10)
                dq = grads[-1][:, : h * size].unflatten(1, (h, size))
                dk, dv = split_keys(grads[0], saved.projections[0].heads)
                p.attend_backward(  # (11)
                    self, index, do.view(-1, h, size), saved.projections, saved.o.view(-1, h, size), saved.lse,
                    wanted, dq, dk, dv,
                )  # fmt: skip
            for projection, grad in zip(saved.projections, grads, strict=True):
                self._rotate_back(index, w, projection, grad, p, wanted)  # (12)
            dh1 = arena.scratch(len(dx), dx.shape[1], dtype=self.dtype)
            first, *others = zip(saved.projections, grads, strict=True)
            first[0].matrix.backward(first[1], out=dh1)  # (12)
            for projection, grad in others:
                assert projection.rows is not None
                at_rows = arena.scratch(len(grad), dx.shape[1], dtype=self.dtype)
                projection.matrix.backward(grad, out=at_rows)
                ops.add_rows(dh1, projection.rows, at_rows)
            if w.attention_norm is None:
                ops.add_scaled(dx, dh1, 1.0, out=dx)
            else:
                ops.rms_norm_backward(dh1, self.at(wanted, x), w.attention_norm, self.config.rms_eps, dx=dx)  # (13)
        return dx

    def add_branch(self, y: Tensor, weight: Tensor | None, x: Tensor, *, out: Tensor) -> Tensor:
        """out [n, d] = x + m·norm(y); weight: of the norm, None where there is none; m: the residual multiplier."""
        if weight is not None:
            y = self.ops.rms_norm(y, weight, self.config.rms_eps, out=self.arena.scratch(*y.shape, dtype=self.dtype))
        return self.ops.add_scaled(x, y, self.config.residual_scale, out=out)

    def branch_gradient(self, dout: Tensor, y: Tensor | None, weight: Tensor | None) -> Tensor:
        """dy [n, d] as scratch: the gradient of `add_branch` with respect to y."""
        arena, scale = self.arena, self.config.residual_scale
        dy = arena.scratch(*dout.shape, dtype=self.dtype)
        if weight is None or y is None:
            return self.ops.scale(dout, scale, out=dy)
        with arena.frame():
            if scale != 1:
                dout = self.ops.scale(dout, scale, out=arena.scratch(*dout.shape, dtype=self.dtype))
            return self.ops.rms_norm_backward(dout, y, weight, self.config.rms_eps, dx=dy.zero_())

    def _plan(self, w: LayerWeights, rows: Tensor | None) -> list[tuple[FrozenMatrix, Heads, Tensor | None]]:
        h, g, size = self.heads
        return [(w.qkv, self.heads, None)] if rows is None else [(w.kv, (0, g, size), None), (w.q, (h, 0, size), rows)]

    def project(
        self, index: int, w: LayerWeights, x: Tensor, p: Pass,
        plan: list[tuple[FrozenMatrix, Heads, Tensor | None]], take: Take,
    ) -> Projections:  # fmt: skip
        """h₁, and q, k, v after norm and rotation."""
        ops, arena, eps, projections = self.ops, self.arena, self.config.rms_eps, []
        for matrix, (h, g, size), rows in plan:
            n = len(x) if rows is None else len(rows)
            out = take(n, (h + 2 * g) * size, dtype=self.dtype)
            raw = take(n, (h + g) * size, dtype=self.dtype) if self.config.qk_norm else None
            projections.append(Projection(matrix, (h, g, size), rows, out, raw))
        with arena.frame():
            h1 = x
            if w.attention_norm is not None:
                h1 = ops.rms_norm(x, w.attention_norm, eps, out=arena.scratch(*x.shape, dtype=self.dtype))  # (1)
            for projection in projections:
                projection.matrix.forward(self.at(projection.rows, h1), out=projection.out)  # (2)
        cache, (cos, sin) = p.cache_rows(index), p.rotation(index)
        for projection in projections:
            if projection.raw is not None:
                projection.raw.copy_(projection.out[:, : projection.raw.shape[1]])
            with arena.frame():
                norms: dict[str, Any] = {"q_norm": w.q_norm, "k_norm": w.k_norm, "eps": eps}
                if self.wide_qk_norm and projection.raw is not None:
                    for part, weight in self._parts(projection, w):
                        ops.rms_norm(projection.raw[:, part], weight, eps, out=projection.out[:, part])
                    norms = {}
                turn = (
                    projection.out, self.at(projection.rows, cos), self.at(projection.rows, sin), projection.heads,
                )  # fmt: skip
                if cache is None or projection is not projections[0]:
                    ops.rope(*turn, **norms)
                else:  # the first projection has the keys and values
                    ops.rope_and_store(*turn, cache, **norms)
        return projections

    def _parts(self, projection: Projection, w: LayerWeights) -> list[tuple[slice, Tensor]]:
        """The columns of q and of k in a projection, and the weights of their norms over all heads."""
        h, g, size = projection.heads
        found = [(slice(0, h * size), w.q_norm), (slice(h * size, (h + g) * size), w.k_norm)]
        return [(part, weight) for part, weight in found if weight is not None and part.stop > part.start]

    def _like(self, projection: Projection, wanted: Tensor | None) -> Tensor:
        rows = wanted if projection.rows is None else projection.rows
        n = len(projection.out) if rows is None else len(rows)
        return self.arena.scratch(n, projection.out.shape[1], dtype=self.dtype)

    def _rotate_back(
        self, index: int, w: LayerWeights, projection: Projection, grad: Tensor, p: Pass, wanted: Tensor | None
    ) -> None:
        """rope⁻¹ of (12), then the qk-norm's (13), in place in `grad` [n, (H + 2G)·D]."""
        rows = wanted if projection.rows is None else projection.rows
        raw, (cos, sin), eps = projection.raw, p.rotation(index), self.config.rms_eps
        with self.arena.frame():
            if raw is not None and projection.rows is None:
                raw = self.at(wanted, raw)
            cos, sin = self.at(rows, cos), self.at(rows, sin)
            if raw is None or not self.wide_qk_norm:
                norms: dict[str, Any] = {"q_norm": w.q_norm, "k_norm": w.k_norm, "eps": eps}
                self.ops.rope_backward(grad, raw, cos, sin, projection.heads, **norms)
                return
            self.ops.rope_backward(grad, None, cos, sin, projection.heads)
            for part, weight in self._parts(projection, w):
                with self.arena.frame():
                    into = self.arena.scratch(len(grad), part.stop - part.start, dtype=self.dtype).zero_()
                    self.ops.rms_norm_backward(grad[:, part], raw[:, part], weight, eps, dx=into)
                    grad[:, part].copy_(into)

    def at(self, rows: Tensor | None, x: Tensor) -> Tensor:
        """x itself, or its rows `rows` [n] as scratch."""
        if rows is None:
            return x
        return self.ops.take_rows(x, rows, out=self.arena.scratch(len(rows), *x.shape[1:], dtype=x.dtype))

    def workspace(self, nbytes: int) -> Tensor | None:
        """Scratch for an operation; None where it needs none."""
        return self.arena.scratch(nbytes, dtype=torch.uint8) if nbytes else None
