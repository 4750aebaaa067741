"""Reads a checkpoint's tensors as frozen matrices and vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embedgrad.backends.base import Backend
from embedgrad.kernels.packing import PackedWeight, stacked
from embedgrad.model.checkpoint import TensorSource
from embedgrad.model.config import ModelConfig
from embedgrad.model.finite import check_all, check_sample
from embedgrad.model.frozen import FrozenMatrix, Widening, product_type, tensors_of
from embedgrad.model.narrowed import NARROWED, narrowed
from embedgrad.model.native_matrices import is_built
from embedgrad.model.packed import (
    QUANTISERS,
    REPACKED,
    PackedMatrix,
    PackedTable,
    as_tensor,
    in_tiles,
    is_packed,
    quantised,
)
from embedgrad.model.quantised import QUANTISED, BlockWeight, TileWeight
from embedgrad.model.rope import rotary_order
from embedgrad.model.streaming import placed
from embedgrad.model.weights import LayerWeights, Weights


def read_weights(
    config: ModelConfig,
    tensors: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    *,
    form: str,
    products: Backend | None = None,
    max_device_memory: int | None = None,
    where: str = "the model",
) -> Weights:
    """Reads the frozen parameters.

    form: how matrices are stored.
    - "compute" converts every matrix to the compute type `dtype`, "fp32" and "bf16" to these types.
    - "stored" keeps the form of the file. On a CPU GGUF's quantised types stay quantised (`embedgrad.model.quantised`),
      some in a wider type (`embedgrad.model.narrowed`); for Triton's kernels Q8_0, Q4_0 and Q4_1 do. Others are
      dequantised. No matrix is stored in a wider type than the compute type.
    - "int8" and "int4" quantise the layers' matrices and an untied head. The embedding table keeps the form of the
      file, because a step reads few of its rows and prompts start from them. So does a head that is tied to the table.
      Norms and biases are never quantised, because they are small.
    products: a backend whose products read packed weights, or None.
    max_device_memory: bytes that the weights may take on `device`. Layers that do not fit are streamed from the host.
        None: no limit.
    where: names the model in messages.

    Raises ModelError where a matrix cannot be quantised or a weight is NaN or infinite, and ConfigError where
    max_device_memory is too small for the embedding, the head and two layers.
    """
    return _Reader(config, tensors, dtype, device, form, products, where).read(max_device_memory)


class _Reader:
    """Reads one checkpoint once; the arguments are those of `read_weights`."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        form: str,
        products: Backend | None,
        where: str,
    ) -> None:
        self.where = where
        self.config, self.tensors, self.dtype, self.device = config, tensors, dtype, device
        self.form, self.products = form, products
        self.place = device
        self.widening = Widening(product_type(dtype, device), device, self._unpack if device.type != "cpu" else None)
        self.errors: dict[str, float] = {}
        self._orders = _orders(config)
        self.wide = {"compute": dtype, "fp32": torch.float32, "bf16": torch.bfloat16}

    def read(self, max_device_memory: int | None) -> Weights:
        """All weights. With a memory limit the layers are read into host memory first."""
        tied = self.config.tied or "lm_head.weight" not in set(self.tensors.names())
        table = self._table(tied)
        final_norm = self._norm("model.norm.weight", self.config.logit_divisor)
        head = self._of([as_tensor(table)], None) if tied else self._matrix("lm_head")
        if max_device_memory is not None:
            self.place = torch.device("cpu")
        layers: Sequence[LayerWeights] = [self._layer(index) for index in range(self.config.num_layers)]
        if max_device_memory is not None:
            always = [*tensors_of(as_tensor(table)), final_norm, *([] if tied else head.tensors())]
            layers = placed(layers, always, self.device, max_device_memory)
        return Weights(table, layers, final_norm, head, self.errors)

    def _unpack(self, weight: PackedWeight, out: Tensor) -> Tensor:
        return out.copy_(weight.dequantize()) if self.products is None else self.products.dequantize(weight, out=out)

    def _table(self, multiplied: bool) -> Any:
        name = "model.embed_tokens.weight"
        if self.form in self.wide:
            return check_all(name, self.tensors.get(name).to(self.device, self.wide[self.form]), self.where)
        table = self._stored(name, multiplied)
        return PackedTable(table) if is_packed(table) else table

    def _vector(self, name: str) -> Tensor:
        # A view would keep the whole file mapped, with every page that was read.
        vector = self._turned(name, self.tensors.get(name))
        return check_all(name, vector.to(self.place, self.dtype, copy=True), self.where)

    def _norm(self, name: str, divisor: float = 1.0) -> Tensor:
        """A norm's weight as the kernels multiply by it: with its offset, and what logits are divided by folded in.

        In a type of 16 bits the quotient is rounded, unless the divisor is a power of two (all published Granite).
        """
        dtype = torch.promote_types(self.dtype, torch.float32) if self.config.kind.wide_norms else self.dtype
        weight = self.tensors.get(name).to(self.place)
        if self.config.norm_offset or divisor != 1:
            weight = (weight.to(torch.promote_types(dtype, torch.float32)) + self.config.norm_offset) / divisor
        return check_all(name, weight.to(dtype, copy=True), self.where)

    def _turned(self, name: str, rows: Tensor) -> Tensor:
        """The matrix rows of a q or k projection, or a vector of theirs, in the order of `rotary_order`."""
        order = self._orders.get(name.rpartition(".")[0].rpartition(".")[2])
        return rows if order is None else rows[order.to(rows.device)]

    def _stored(self, name: str, multiplied: bool = True) -> Any:
        """The matrix in the form of the file; `multiplied`: products read it, not its rows alone."""
        return check_sample(name, self._as_in_file(name, multiplied), self.where)

    def _as_in_file(self, name: str, multiplied: bool) -> Any:
        raw = self.tensors.raw(name)
        raw = None if raw is None else (raw[0], self._turned(name, raw[1]))
        if raw is not None and self.products is None and self.device.type == "cpu":
            weight = self._blocks(*raw, name)
            if weight is not None:
                return self._tiled(weight, name) if multiplied and is_built() else weight
        elif raw is not None and raw[0] in REPACKED:
            kind, blocks = raw
            return REPACKED[kind](blocks.to(self.place))
        tensor = self._turned(name, self.tensors.get(name))
        return tensor.to(self.place, self.dtype if tensor.dtype.itemsize > self.dtype.itemsize else tensor.dtype)

    def _blocks(self, kind: str, blocks: Tensor, name: str) -> BlockWeight | None:
        """The matrix in blocks that csrc/ reads; None where there are none."""
        rows, columns = self.tensors.shapes()[name]
        if kind in QUANTISED:
            return BlockWeight(kind, blocks, (rows, columns))
        return narrowed(kind, blocks, (rows, columns)) if kind in NARROWED and is_built() else None

    def _tiled(self, weight: BlockWeight, name: str) -> TileWeight:
        tiles = TileWeight.of(weight)
        self.tensors.release(name)
        return tiles

    def _part(self, name: str) -> Any:
        """The matrix in the requested form."""
        if self.form == "stored":
            return self._stored(name)
        tensor = self._turned(name, self.tensors.get(name))
        if self.form in QUANTISERS:
            weight, self.errors[name] = quantised(name, tensor.to(self.device), self.form)
            if self.products is None and self.device.type == "cpu":
                return in_tiles(weight)
            return weight.to(self.place)
        return check_all(name, tensor.to(self.place, self.wide[self.form]), self.where)

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
        config, kind, at = self.config, self.config.kind, f"model.layers.{index}."
        qkv = self._matrix(*(at + name for name in kind.qkv), bias=config.qkv_bias)
        queries = config.num_heads * config.head_dim
        norms = [None if name is None else self._norm(f"{at}{name}.weight") for name in kind.norms]
        return LayerWeights(
            attention_norm=norms[0],
            qkv=qkv,
            q=qkv.rows(0, queries),
            kv=qkv.rows(queries, qkv.shape[0]),
            q_norm=self._norm(at + "self_attn.q_norm.weight") if config.qk_norm else None,
            k_norm=self._norm(at + "self_attn.k_norm.weight") if config.qk_norm else None,
            out=self._matrix(at + "self_attn.o_proj", bias=config.output_bias),
            mlp_norm=norms[2],
            gate_up=self._matrix(*(at + name for name in kind.gate_up), bias=config.mlp_bias),
            down=self._matrix(at + "mlp.down_proj", bias=config.mlp_bias),
            attention_post_norm=norms[1],
            mlp_post_norm=norms[3],
        )


def _orders(config: ModelConfig) -> dict[str, Tensor]:
    """For each projection of which a part of a head is rotated: its matrix rows in the order of `rotary_order`."""
    head = rotary_order(config.rope, config.head_dim)
    if head is None:
        return {}

    def rows(heads: int) -> Tensor:
        return (torch.arange(heads)[:, None] * config.head_dim + head).flatten()

    q, k = rows(config.num_heads), rows(config.num_kv_heads)
    values = torch.arange(config.num_kv_heads * config.head_dim)
    return {"q_proj": q, "k_proj": k, "qkv_proj": torch.cat([q, len(q) + k, len(q) + len(k) + values])}


def _together(parts: list[Any]) -> list[Any]:
    """`parts` stacked as one packed weight; `parts` unchanged where their layouts differ (a file that mixes types)."""
    try:
        return [stacked(parts)]
    except ValueError:
        return parts
