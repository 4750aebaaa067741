"""The MLP of one frozen block, forward and backward: x₁ → x₂ and dx₂ → dx₁ (docs/design.md, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from embedgrad.backends.base import Backend
from embedgrad.engine.attention import Attention
from embedgrad.model.config import ModelConfig
from embedgrad.model.families import GELU_TANH
from embedgrad.model.weights import LayerWeights


class Mlp:
    """The MLP of every block of a model on one backend. Shapes: T tokens, d width, F feed-forward width.

    attention: what x₁ came from; it adds branches to the residual stream in the same way.
    """

    def __init__(self, config: ModelConfig, ops: Backend, dtype: torch.dtype, attention: Attention) -> None:
        self.config, self.ops, self.dtype, self.arena = config, ops, dtype, attention.arena
        self.attention = attention
        self.gelu = config.kind.gate == GELU_TANH

    def gate_up(self, w: LayerWeights, x1: Tensor, *, keep: bool) -> Tensor:
        """[g, u] [T, 2F], from the arena's bottom where it is to be kept."""
        arena, size = self.arena, 2 * self.config.intermediate_size
        gate_up = (arena.keep if keep else arena.scratch)(len(x1), size, dtype=self.dtype)
        with arena.frame():
            h2 = x1
            if w.mlp_norm is not None:
                h2 = arena.scratch(*x1.shape, dtype=self.dtype)
                self.ops.rms_norm(x1, w.mlp_norm, self.config.rms_eps, out=h2)  # (5)
            w.gate_up.forward(h2, out=gate_up)  # (6)
        return gate_up

    def forward(self, w: LayerWeights, x1: Tensor, gate_up: Tensor, *, out: Tensor) -> Tensor:
        """out [T, d] = x₂ = x₁ + m·norm(a W_dᵀ); most families have neither the norm nor the multiplier m."""
        if not self.attention.behind:
            return w.down.forward(self._active(gate_up), out=out, add=x1)  # (7)
        with self.arena.frame():
            return self.attention.add_branch(self._branch(w, gate_up), w.mlp_post_norm, x1, out=out)  # (7)

    def backward(self, w: LayerWeights, x1: Tensor, gate_up: Tensor, dx: Tensor) -> Tensor:
        """dx₂ → dx₁ in place in dx [T, d]; gate_up is overwritten by its gradient."""
        arena = self.arena
        with arena.frame():
            da = arena.scratch(len(dx), self.config.intermediate_size, dtype=self.dtype)
            with arena.frame():
                dy = dx
                if self.attention.behind:
                    y = None if w.mlp_post_norm is None else self._branch(w, gate_up)  # computed again, not kept
                    dy = self.attention.branch_gradient(dx, y, w.mlp_post_norm)
                w.down.backward(dy, out=da)  # (8)
            self.ops.swiglu_backward(da, gate_up, out=gate_up, gelu=self.gelu)  # (8)
        with arena.frame():
            dh2 = arena.scratch(*dx.shape, dtype=self.dtype)
            w.gate_up.backward(gate_up, out=dh2)  # (9)
            if w.mlp_norm is None:
                return self.ops.add_scaled(dx, dh2, 1.0, out=dx)
            return self.ops.rms_norm_backward(dh2, x1, w.mlp_norm, self.config.rms_eps, dx=dx)  # (13)

    def _active(self, gate_up: Tensor) -> Tensor:
        """a [T, F] = gate(g) ⊙ u."""
        a = self.arena.scratch(len(gate_up), self.config.intermediate_size, dtype=self.dtype)
        return self.ops.swiglu(gate_up, out=a, gelu=self.gelu)  # (6)

    def _branch(self, w: LayerWeights, gate_up: Tensor) -> Tensor:
        """y [T, d] = a W_dᵀ."""
        y = self.arena.scratch(len(gate_up), self.config.hidden_size, dtype=self.dtype)
        with self.arena.frame():
            return w.down.forward(self._active(gate_up), out=y)
