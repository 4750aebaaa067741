"""The frozen transformer: forward, and backward to the prompt's embeddings, written once for every backend.

Equations and names are those of docs/design.md, section 4; `ops` is a `Backend`. Shapes: T packed tokens, R tokens that
predict a target, P tokens that show a prompt row, d width, k prompt rows.

What is left out, and why that is exact: there are no weight gradients; the last layer computes queries, attention
output and MLP at the R predicting tokens only, since nothing else is read; the first layer's backward computes dq, dk,
dv and dx at the P prompt tokens only, for the same reason; the prefix takes part as keys and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.backends.base import Backend
from embedgrad.engine.arena import Arena
from embedgrad.engine.attention import Attention, Pass, SavedAttention
from embedgrad.engine.mlp import Mlp
from embedgrad.engine.packed_pass import PackedPass
from embedgrad.model.config import ModelConfig
from embedgrad.model.weights import Weights

SAVED_BY_POLICY = {  # what each memory policy keeps for the backward pass; the rest is computed again
    "all": frozenset({"qkv", "o", "x1", "gate_up"}),
    "mlp": frozenset({"qkv", "o", "x1"}),
    "layer": frozenset[str](),
}
NOTHING = frozenset[str]()


@dataclass(frozen=True)
class Saved:
    """One block's activations. What a policy does not keep is None, and computed again as a whole.

    mark: where the block's own tensors begin in the arena.
    """

    x: Tensor  # [T, d]
    attention: SavedAttention | None
    gate_up: Tensor | None  # [T or R, 2F]
    mark: int


class Decoder:
    """A frozen model on one backend. One forward may be followed by one backward of the same pass."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Backend, dtype: torch.dtype, arena: Arena) -> None:
        self.config, self.weights, self.ops, self.dtype, self.arena = config, weights, ops, dtype, arena
        self.attention = Attention(config, ops, dtype, arena)
        self.mlp = Mlp(config, ops, dtype, self.attention)
        self.sum_dtype, self.heads = self.attention.sum_dtype, self.attention.heads
        self.embedding_scale = config.embedding_scale_in(dtype)
        self.no_prompt = torch.zeros(1, config.hidden_size, dtype=dtype, device=arena.device)
        self._saved: list[Saved] = []

    def forward(self, prompt: Tensor, p: PackedPass, policy: str | None) -> Tensor:
        """Final-normed hidden states [R, d] at `p.rows`; `policy` None keeps nothing for a backward pass."""
        self._saved = []
        x = self.embed(prompt, p.ids, p.prompt_rows)
        for index in range(self.config.num_layers):
            saved, x = self._block(index, x, p, p.rows, policy)
            if policy is not None:
                self._saved.append(saved)
        self._x_final = x
        return self.final_norm(x)

    def keys_and_values(self, prompt: Tensor, p: PackedPass) -> Tensor | None:
        """Forward only, for the sake of what `p.cache_rows` takes.

        Returns the final-normed hidden states [R, d] at `p.rows`, or None where there are none: then the last layer
        stops at its keys and values.
        """
        x = self.embed(prompt, p.ids, p.prompt_rows)
        last = self.config.num_layers - 1
        for index in range(self.config.num_layers):
            if index == last and p.rows is not None and len(p.rows) == 0:
                with self.arena.frame():
                    self.attention.keys_only(index, self.weights.layers[index], x, p)
                return None
            _, x = self._block(index, x, p, p.rows, None)
        return self.final_norm(x)

    def next_hidden(self, ids: Tensor, p: Pass) -> Tensor:
        """Final-normed hidden states [B, d] of one new token `ids` [B] for each of B sequences."""
        x = self.embed(self.no_prompt, ids, torch.full_like(ids, -1))
        for index in range(self.config.num_layers):
            _, x = self._block(index, x, p, None, None)
        return self.final_norm(x)

    def backward(self, dh: Tensor, p: PackedPass, grad: Tensor) -> Tensor:
        """grad [k, d] of the prompt's rows, from dh [R, d] at the hidden states that `forward` returned."""
        ops, arena, config = self.ops, self.arena, self.config
        dx = arena.scratch(*dh.shape, dtype=self.dtype).zero_()
        ops.rms_norm_backward(dh, self._x_final, self.weights.final_norm, config.rms_eps, dx=dx)  # (13)
        dx_all = dx if p.rows is None else arena.scratch(len(p.ids), dx.shape[1], dtype=self.dtype)
        for index in reversed(range(config.num_layers)):
            saved = self._saved.pop()
            with arena.frame():
                dx = self._block_backward(index, saved, dx, dx_all, p)
            if index > 0:  # the first layer's dx may be a kept tensor
                arena.drop(saved.mark)
        shown = p.prompt_rows
        if p.shown is not None and len(dx) != len(shown):
            out = torch.empty(len(dx), dtype=shown.dtype, device=shown.device)
            shown = ops.take_rows(shown, p.shown.tokens, out=out)
        ops.embed_backward(dx, shown, grad=grad)
        return grad if self.embedding_scale == 1 else ops.scale(grad, self.embedding_scale, out=grad)

    def embed(self, prompt: Tensor, ids: Tensor, prompt_rows: Tensor) -> Tensor:
        """x [T, d] of the first block."""
        x = self.arena.keep(len(ids), self.config.hidden_size, dtype=self.dtype)
        self.ops.embed(prompt, self.weights.embedding, ids, prompt_rows, out=x)
        return x if self.embedding_scale == 1 else self.ops.scale(x, self.embedding_scale, out=x)

    def final_norm(self, x: Tensor) -> Tensor:
        """What the head reads."""
        out = self.arena.keep(*x.shape, dtype=self.dtype)
        return self.ops.rms_norm(x, self.weights.final_norm, self.config.rms_eps, out=out)

    def _rows(self, index: int, rows: Tensor | None) -> Tensor | None:
        return rows if index == self.config.num_layers - 1 else None

    def _block(self, index: int, x: Tensor, p: Pass, rows: Tensor | None, policy: str | None) -> tuple[Saved, Tensor]:
        """x → x₂. Without a policy, x₂ takes the place of x."""
        w, rows, arena = self.weights.layers[index], self._rows(index, rows), self.arena
        keep = NOTHING if policy is None else SAVED_BY_POLICY[policy]
        size, mark = len(x) if rows is None else len(rows), arena.mark()
        x2 = x if policy is None else arena.keep(size, x.shape[1], dtype=self.dtype)
        with arena.frame():
            attention = self.attention.forward(index, w, x, p, rows, keep=keep)
            gate_up = self.mlp.gate_up(w, attention.x1, keep="gate_up" in keep)
            x2 = self.mlp.forward(w, attention.x1, gate_up, out=x2[:size])
        return Saved(x, attention if "qkv" in keep else None, gate_up if "gate_up" in keep else None, mark), x2

    def _block_backward(self, index: int, saved: Saved, dx: Tensor, dx_all: Tensor, p: PackedPass) -> Tensor:
        """dx₂ → dx [T, d], or [P, d] from the first layer where only the prompt's tokens are wanted.

        dx_all [T, d] takes the result of the last layer, where dx₂ exists at the R predicting tokens only.
        """
        w, rows, ops, x = self.weights.layers[index], self._rows(index, p.rows), self.ops, saved.x
        attention = saved.attention or self.attention.forward(index, w, x, p, rows, keep=NOTHING)
        gate_up = saved.gate_up
        if gate_up is None:
            gate_up = self.mlp.gate_up(w, attention.x1, keep=False)
        dx1 = self.mlp.backward(w, attention.x1, gate_up, dx)
        self.arena.drop(attention.x1_mark)
        wanted = p.shown.tokens if index == 0 and rows is None and p.shown is not None else None
        if rows is not None:
            dx = ops.put_rows(dx_all.zero_(), rows, dx1)
        elif wanted is not None:
            dx = ops.take_rows(dx1, wanted, out=self.arena.keep(len(wanted), dx1.shape[1], dtype=self.dtype))
        return self.attention.backward(index, w, x, attention, dx1, p, wanted=wanted, dx=dx)
