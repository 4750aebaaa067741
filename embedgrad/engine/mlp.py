"""The MLP of one frozen block, forward and backward: x₁ → x₂ and dx₂ → dx₁ (docs/design.md, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from embedgrad.backends.base import Backend
from embedgrad.engine.arena import Arena
from embedgrad.model.config import ModelConfig
from embedgrad.model.weights import LayerWeights


class Mlp:
    """The MLP of every block of a model on one backend. Shapes: T tokens, d width, F feed-forward width."""

    def __init__(self, config: ModelConfig, ops: Backend, dtype: torch.dtype, arena: Arena) -> None:
        self.config, self.ops, self.dtype, self.arena = config, ops, dtype, arena

    def gate_up(self, w: LayerWeights, x1: Tensor, *, keep: bool) -> Tensor:
        """[g, u] [T, 2F], from the arena's bottom where it is to be kept."""
        arena, size = self.arena, 2 * self.config.intermediate_size
        gate_up = (arena.keep if keep else arena.scratch)(len(x1), size, dtype=self.dtype)
        with arena.frame():
            h2 = arena.scratch(*x1.shape, dtype=self.dtype)
            self.ops.rms_norm(x1, w.mlp_norm, self.config.rms_eps, out=h2)  # (5)
            w.gate_up.forward(h2, out=gate_up)  # (6)
        return gate_up

    def forward(self, w: LayerWeights, x1: Tensor, gate_up: Tensor, *, out: Tensor) -> Tensor:
        """out [T, d] = x₂ = x₁ + (g σ(g) ⊙ u) W_dᵀ."""
        a = self.arena.scratch(len(x1), self.config.intermediate_size, dtype=self.dtype)
        self.ops.swiglu(gate_up, out=a)  # (6)
        return w.down.forward(a, out=out, add=x1)  # (7)

    def backward(self, w: LayerWeights, x1: Tensor, gate_up: Tensor, dx: Tensor) -> Tensor:
        """dx₂ → dx₁ in place in dx [T, d]; gate_up is overwritten by its gradient."""
        arena = self.arena
        with arena.frame():
            da = arena.scratch(len(dx), self.config.intermediate_size, dtype=self.dtype)
            w.down.backward(dx, out=da)  # (8)
            self.ops.swiglu_backward(da, gate_up, out=gate_up)  # (8)
        with arena.frame():
            dh2 = arena.scratch(*dx.shape, dtype=self.dtype)
            w.gate_up.backward(gate_up, out=dh2)  # (9)
            return self.ops.rms_norm_backward(dh2, x1, w.mlp_norm, self.config.rms_eps, dx=dx)
