"""The frozen matrices and vectors of the decoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from embedgrad.model.frozen import FrozenMatrix, tensors_of
from embedgrad.model.packed import as_tensor


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer. `q` and `kv` are matrix rows of `qkv` and share its storage.

    attention_norm, mlp_norm [d]: in front of attention and MLP; attention_post_norm, mlp_post_norm [d]: behind them.
    q_norm, k_norm: [D] for each head, or [H·D] and [G·D] over all heads. None: there is no such norm.
    """

    attention_norm: Tensor | None
    qkv: FrozenMatrix
    q: FrozenMatrix
    kv: FrozenMatrix
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: FrozenMatrix
    mlp_norm: Tensor | None
    gate_up: FrozenMatrix
    down: FrozenMatrix
    attention_post_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None

    def _norms(self) -> tuple[Tensor | None, ...]:
        return (
            self.attention_norm, self.mlp_norm, self.q_norm, self.k_norm, self.attention_post_norm, self.mlp_post_norm,
        )  # fmt: skip

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the layer once, in a fixed order."""
        for vector in self._norms():
            if vector is not None:
                yield vector
        for matrix in (self.qkv, self.out, self.gate_up, self.down):
            yield from matrix.tensors()

    def moved(self, move: Callable[[Tensor], Tensor]) -> LayerWeights:
        """A copy of the layer in which each tensor x is replaced by move(x), in the order of `tensors`."""
        norms = [None if x is None else move(x) for x in self._norms()]
        attention_norm, mlp_norm, q_norm, k_norm, attention_post_norm, mlp_post_norm = norms
        qkv, out, gate_up, down = (m.moved(move) for m in (self.qkv, self.out, self.gate_up, self.down))
        queries = self.q.shape[0]
        q, kv = qkv.rows(0, queries), qkv.rows(queries, qkv.shape[0])
        return LayerWeights(
            attention_norm, qkv, q, kv, q_norm, k_norm, out, mlp_norm, gate_up, down, attention_post_norm, mlp_post_norm
        )


@dataclass(frozen=True)
class Weights:
    """All frozen parameters. Vectors are in the compute type; norms of families with `wide_norms` in float32 at least.

    embedding [V, d]: the table as a tensor in its stored type, or as a `PackedTable`. quantisation_errors: relative
    error ‖W − Ŵ‖/‖W‖ (Frobenius norm), by name, of every tensor that was quantised while it was read.
    """

    embedding: Any
    layers: Sequence[LayerWeights]
    final_norm: Tensor
    head: FrozenMatrix
    quantisation_errors: dict[str, float] = field(default_factory=dict)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor once, in a fixed order."""
        table = as_tensor(self.embedding)
        yield from tensors_of(table)
        for layer in self.layers:
            yield from layer.tensors()
        yield self.final_norm
        if self.head.parts[0] is not table:
            yield from self.head.tensors()

    def hash(self) -> str:
        """sha256 (hexadecimal) over the bytes of all tensors."""
        digest = hashlib.sha256()
        for tensor in self.tensors():
            for piece in tensor.detach().reshape(-1).split(1 << 24):
                digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()
