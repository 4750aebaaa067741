"""The frozen decoder for one token per sequence in csrc/decode/: what it takes of a model, and whether it can."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embedgrad.backends import native_core
from embedgrad.backends.native_core import FIRST_QUANTISED, Cache, DecoderSpec, LayerSpec, Matrix
from embedgrad.engine.packed_pass import rotation_tables
from embedgrad.model.config import ModelConfig
from embedgrad.model.families import GELU_TANH
from embedgrad.model.frozen import FrozenMatrix
from embedgrad.model.native_matrices import few_rows, native_matrix, readable_matrix
from embedgrad.model.weights import Weights, as_tensor

GROWTH = 256  # positions by which the table of rotations grows


class NativeDecoder:
    """Decodes float32 on the CPU, from matrices as they are stored."""

    def __init__(self, config: ModelConfig, weights: Weights, matrices: Sequence[Matrix]) -> None:
        embedding, head, *rest = matrices
        self._core = native_core.library()
        self._config = config
        self._head = head
        self.in_blocks = any(
            matrix.parts[i].stored >= FIRST_QUANTISED for matrix in rest for i in range(matrix.num_parts)
        )
        self._alive: list[Any] = [weights, matrices]
        layers = (LayerSpec * config.num_layers)()
        for n, layer in enumerate(weights.layers):
            norms = (
                layer.attention_norm, layer.attention_post_norm, layer.mlp_norm, layer.mlp_post_norm,
                layer.q_norm, layer.k_norm,
            )  # fmt: skip
            rotation, window = config.ropes[1][n], config.windows[n] or 0
            layers[n] = LayerSpec(*(_address(x) for x in norms), *rest[4 * n : 4 * n + 4], window, rotation)
        spec = DecoderSpec(
            config.num_layers, config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads,
            config.head_dim, config.vocab_size, config.kind.gate == GELU_TANH, config.kind.wide_qk_norm,
            config.rms_eps, config.scale, config.embedding_scale_in(torch.float32), config.residual_scale,
            config.attention_softcap or 0.0, config.logit_softcap or 0.0, layers, _address(weights.final_norm),
            embedding, head,
        )  # fmt: skip
        self._alive += [layers, spec]
        self.handle = self._core.embedgrad_decoder_create(ctypes.byref(spec))
        self._cos = self._sin = torch.empty(len(config.ropes[0]), 0, config.head_dim // 2)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._core.embedgrad_decoder_free(self.handle)

    @classmethod
    def of(cls, config: ModelConfig, weights: Weights) -> NativeDecoder | None:
        """For a float32 model on the CPU whose every matrix is stored in a way that csrc/ multiplies by; else None."""
        if not isinstance(weights.layers, list) or config.head_dim % 2:  # streamed layers have no fixed place
            return None
        matrices = [readable_matrix([as_tensor(weights.embedding)]), _native(weights.head)]
        for layer in weights.layers:
            matrices += [_native(m) for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        usable = [matrix for matrix in matrices if matrix is not None]
        return cls(config, weights, usable) if len(usable) == len(matrices) else None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, V] of final-normed hidden states [B, d]."""
        return few_rows(self._head, hidden, self._core)

    def cache(self, prefix: Tensor, own: Tensor) -> Cache:
        """Keys and values as csrc/ takes them: prefix [L, 2, S, G, D], own [L, 2, B, C, G, D], contiguous."""
        length, capacity = prefix.shape[2], own.shape[3]
        self._rotations(length + capacity)
        rotations = self._cos.data_ptr(), self._sin.data_ptr(), self._cos.shape[1]
        return Cache(prefix.data_ptr(), own.data_ptr(), length, own.shape[2], capacity, *rotations)

    def advance(
        self, prefix: Tensor, own: Tensor, slots: Tensor, positions: Tensor, tokens: Tensor, wanted: Tensor
    ) -> Tensor:
        """Append T tokens to the sequences `slots` [T] at `positions` [T], each sequence's in their order.

        tokens: ids [T] int64, or what goes in, [T, d] float32. Returns the logits [n, V] of the rows `wanted` [n].
        """
        logits = torch.empty(len(wanted), self._config.vocab_size)
        slots, positions, wanted = (x.to(torch.int32) for x in (slots, positions, wanted))
        target = torch.arange(len(wanted), dtype=torch.int32)
        tokens = tokens.to(torch.int32) if tokens.dim() == 1 else tokens.contiguous()
        ids, embeddings = (tokens.data_ptr(), None) if tokens.dim() == 1 else (None, tokens.data_ptr())
        cache = self.cache(prefix, own)
        rows = native_core.Tokens(len(slots), slots.data_ptr(), positions.data_ptr(), ids, embeddings)
        chosen = native_core.Wanted(len(wanted), wanted.data_ptr(), target.data_ptr(), logits.data_ptr())
        arguments = (ctypes.byref(x) for x in (cache, rows, chosen))
        self._core.embedgrad_decoder_advance(self.handle, *arguments, torch.get_num_threads())
        return logits

    def run(self, loop: native_core.Loop) -> str:
        """The generation loop, until something is to be done: one of `native_core.LOOP_ENDS`. The GIL is released."""
        end = self._core.embedgrad_generate(self.handle, ctypes.byref(loop), torch.get_num_threads())
        assert end >= 0, f"the sampler refuses its settings (number {-1 - end})"
        return native_core.LOOP_ENDS[end]

    def _rotations(self, positions: int) -> None:
        if positions > self._cos.shape[1]:
            count = -(-positions // GROWTH) * GROWTH
            tables = rotation_tables(self._config, torch.arange(count), torch.float32)
            self._cos, self._sin = (torch.stack(table) for table in zip(*tables, strict=True))


def _native(matrix: FrozenMatrix) -> Matrix | None:
    return native_matrix(matrix.parts, matrix.bias)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
