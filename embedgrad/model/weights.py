"""A checkpoint's tensors as the frozen matrices and vectors that the decoder works with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from embedgrad.kernels.packing import PackedWeight, stacked
from embedgrad.model.checkpoint import TensorSource
from embedgrad.model.config import ModelConfig
from embedgrad.model.frozen import FrozenMatrix, Widening, product_type, tensors_of
from embedgrad.model.gguf_blocks import GGUF_BLOCKS, BlockWeight
from embedgrad.model.packed import (
    QUANTISERS,
    PackedMatrix,
    PackedTable,
    Products,
    as_tensor,
    is_packed,
    quantised,
)
from embedgrad.model.repacking import REPACKED, repacked
from embedgrad.model.streaming import placed


@dataclass(frozen=True)
class LayerWeights:
    """One block. `q` and `kv` are rows of `qkv`."""

    attention_norm: Tensor
    qkv: FrozenMatrix
    q: FrozenMatrix
    kv: FrozenMatrix
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: FrozenMatrix
    mlp_norm: Tensor
    gate_up: FrozenMatrix
    down: FrozenMatrix

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the block once, in a fixed order."""
        for vector in (self.attention_norm, self.mlp_norm, self.q_norm, self.k_norm):
            if vector is not None:
                yield vector
        for matrix in (self.qkv, self.out, self.gate_up, self.down):
            yield from matrix.tensors()

    def moved(self, move: Callable[[Tensor], Tensor]) -> LayerWeights:
        """The same block with every tensor replaced by `move` of it, in the order of `tensors`."""
        norms = [self.attention_norm, self.mlp_norm, self.q_norm, self.k_norm]
        attention_norm, mlp_norm, q_norm, k_norm = (None if x is None else move(x) for x in norms)
        qkv, out, gate_up, down = (m.moved(move) for m in (self.qkv, self.out, self.gate_up, self.down))
        assert attention_norm is not None
        assert mlp_norm is not None
        queries = self.q.shape[0]
        q, kv = qkv.rows(0, queries), qkv.rows(queries, qkv.shape[0])
        return LayerWeights(attention_norm, qkv, q, kv, q_norm, k_norm, out, mlp_norm, gate_up, down)


@dataclass(frozen=True)
class Weights:
    """All frozen parameters; vectors are in the compute type.

    embedding [V, d]: a tensor in the type it is stored in, or a `PackedTable`. quantisation_errors: ‖W − Ŵ‖/‖W‖
    (Frobenius) of every tensor that was quantised while it was read, by name.
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
        """sha256 over the bytes of every tensor, hexadecimal."""
        digest = hashlib.sha256()
        for tensor in self.tensors():
            for piece in tensor.detach().reshape(-1).split(1 << 24):
                digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def read_weights(
    config: ModelConfig,
    tensors: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    *,
    form: str,
    products: Products | None = None,
    max_device_memory: int | None = None,
) -> Weights:
    """Build the frozen parameters.

    form: "compute" brings every matrix to the compute type now, "fp32" and "bf16" to these. "stored" keeps it as the
    file has it; GGUF's Q8_0, Q4_0 and Q4_1, and on the CPU Q5_0, Q4_K and Q6_K, stay in blocks, its other types are
    dequantised, and no matrix is stored wider than the compute type.
    "int8" and "int4" quantise the blocks' matrices and an untied head; the embedding table stays as it is stored,
    because only a few of its rows are read in a step and they are what prompts start from, and so does a head that is
    tied to it; norms and biases are too small to matter. products: of a backend that multiplies by packed weights.
    max_device_memory: bytes that the weights may take on `device`; what does not fit is streamed from the host.

    Raises ModelError (cannot be quantised), ConfigError (not even one block fits).
    """
    return _Reader(config, tensors, dtype, device, form, products).read(max_device_memory)


class _Reader:
    """One reading of one checkpoint."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        form: str,
        products: Products | None,
    ) -> None:
        self.config, self.tensors, self.dtype, self.device = config, tensors, dtype, device
        self.form, self.products = form, products
        self.place = device
        self.widening = Widening(product_type(dtype, device), device)
        self.errors: dict[str, float] = {}
        self.wide = {"compute": dtype, "fp32": torch.float32, "bf16": torch.bfloat16}

    def read(self, max_device_memory: int | None) -> Weights:
        """Everything; blocks go to the host first where the device's room is limited."""
        table = self._table()
        final_norm = self._vector("model.norm.weight")
        tied = self.config.tied or "lm_head.weight" not in set(self.tensors.names())
        head = self._of([as_tensor(table)], None) if tied else self._matrix("lm_head")
        if max_device_memory is not None:
            self.place = torch.device("cpu")
        layers: Sequence[LayerWeights] = [self._layer(index) for index in range(self.config.num_layers)]
        if max_device_memory is not None:
            always = [*tensors_of(as_tensor(table)), final_norm, *([] if tied else head.tensors())]
            layers = placed(layers, always, self.device, max_device_memory)
        return Weights(table, layers, final_norm, head, self.errors)

    def _table(self) -> Any:
        name = "model.embed_tokens.weight"
        if self.form in self.wide:
            return self.tensors.get(name).to(self.device, self.wide[self.form])
        table = self._stored(name)
        return PackedTable(table) if is_packed(table) else table

    def _vector(self, name: str) -> Tensor:
        # A copy: a view would keep the whole file mapped, and every page of it that was read.
        return self.tensors.get(name).to(self.place, self.dtype, copy=True)

    def _stored(self, name: str) -> Any:
        """The matrix as the file has it."""
        raw = self.tensors.raw(name)
        if raw is not None and raw[0] in REPACKED:
            return repacked(*raw).to(self.place)
        if raw is not None and raw[0] in GGUF_BLOCKS and self.device.type == "cpu":
            rows, columns = self.tensors.shapes()[name]
            return BlockWeight(*raw, (rows, columns))
        tensor = self.tensors.get(name)
        return tensor.to(self.place, self.dtype if tensor.dtype.itemsize > self.dtype.itemsize else tensor.dtype)

    def _part(self, name: str) -> Any:
        """The matrix in the form that was asked for."""
        if self.form == "stored":
            return self._stored(name)
        tensor = self.tensors.get(name)
        if self.form in QUANTISERS:
            weight, self.errors[name] = quantised(name, tensor.to(self.device), self.form)
            return weight.to(self.place)
        return tensor.to(self.place, self.wide[self.form])

    def _matrix(self, *names: str, bias: bool = False) -> FrozenMatrix:
        parts = [self._part(f"{name}.weight") for name in names]
        added = torch.cat([self._vector(f"{name}.bias") for name in names]) if bias else None
        if len(parts) > 1 and all(isinstance(part, PackedWeight) for part in parts):
            parts = _together(parts)
        elif len(parts) > 1 and not any(is_packed(part) for part in parts):
            kept = self.wide.get(self.form, self.dtype)
            parts = [torch.cat(parts)] if all(part.dtype == kept for part in parts) else parts
        return self._of(parts, added)

    def _of(self, parts: list[Any], bias: Tensor | None) -> FrozenMatrix:
        if self.products is not None and len(parts) == 1 and isinstance(parts[0], PackedWeight):
            return PackedMatrix(parts, bias, self.widening, self.products)
        return FrozenMatrix(parts, bias, self.widening)

    def _layer(self, index: int) -> LayerWeights:
        config, at = self.config, f"model.layers.{index}."
        attention, mlp = at + "self_attn.", at + "mlp."
        qkv = self._matrix(attention + "q_proj", attention + "k_proj", attention + "v_proj", bias=config.qkv_bias)
        queries = config.num_heads * config.head_dim
        return LayerWeights(
            attention_norm=self._vector(at + "input_layernorm.weight"),
            qkv=qkv,
            q=qkv.rows(0, queries),
            kv=qkv.rows(queries, qkv.shape[0]),
            q_norm=self._vector(attention + "q_norm.weight") if config.qk_norm else None,
            k_norm=self._vector(attention + "k_norm.weight") if config.qk_norm else None,
            out=self._matrix(attention + "o_proj", bias=config.output_bias),
            mlp_norm=self._vector(at + "post_attention_layernorm.weight"),
            gate_up=self._matrix(mlp + "gate_proj", mlp + "up_proj", bias=config.mlp_bias),
            down=self._matrix(mlp + "down_proj", bias=config.mlp_bias),
        )


def _together(parts: list[Any]) -> list[Any]:
    """One packed weight of them all; as they are where their layouts differ (a file that mixes types)."""
    try:
        return [stacked(parts)]
    except ValueError:
        return parts
