"""A checkpoint's tensors as the frozen matrices and vectors that the decoder works with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from embedgrad.model.config import ModelConfig
from embedgrad.model.frozen import FrozenMatrix, Widening


class TensorSource(Protocol):
    """Tensors by their canonical names (those of a Hugging Face checkpoint)."""

    def names(self) -> list[str]: ...
    def get(self, name: str) -> Tensor: ...


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


@dataclass(frozen=True)
class Weights:
    """All frozen parameters; `embedding` [V, d] in the type it is stored in, vectors in the compute type."""

    embedding: Tensor
    layers: list[LayerWeights]
    final_norm: Tensor
    head: FrozenMatrix

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor once, in a fixed order."""
        yield self.embedding
        for layer in self.layers:
            for vector in (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm):
                if vector is not None:
                    yield vector
            for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down):
                yield from matrix.parts
                if matrix.bias is not None:
                    yield matrix.bias
        yield self.final_norm
        if self.head.parts[0] is not self.embedding:
            yield from self.head.parts

    def hash(self) -> str:
        """sha256 over the bytes of every tensor, hexadecimal."""
        digest = hashlib.sha256()
        for tensor in self.tensors():
            for piece in tensor.detach().reshape(-1).split(1 << 24):
                digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def read_weights(
    config: ModelConfig, tensors: TensorSource, dtype: torch.dtype, device: torch.device, *, widen: bool
) -> Weights:
    """Build the frozen parameters. `widen`: bring every matrix to the compute type now, else keep it as stored."""
    widening = Widening(dtype, device)
    names = set(tensors.names())

    def vector(name: str) -> Tensor:
        return tensors.get(name).to(device, dtype)

    def matrix(*parts: str, bias: bool = False) -> FrozenMatrix:
        stored = [tensors.get(f"{part}.weight") for part in parts]
        added = torch.cat([vector(f"{part}.bias") for part in parts]) if bias else None
        if widen or all(part.dtype == dtype for part in stored):
            stored = [part.to(device, dtype) for part in stored]
            if len(stored) > 1:
                stored = [torch.cat(stored)]
        return FrozenMatrix([part.to(device) for part in stored], added, widening)

    def layer(index: int) -> LayerWeights:
        at = f"model.layers.{index}."
        attention, mlp = at + "self_attn.", at + "mlp."
        qkv = matrix(attention + "q_proj", attention + "k_proj", attention + "v_proj", bias=config.qkv_bias)
        queries = config.num_heads * config.head_dim
        return LayerWeights(
            attention_norm=vector(at + "input_layernorm.weight"),
            qkv=qkv,
            q=qkv.rows(0, queries),
            kv=qkv.rows(queries, qkv.shape[0]),
            q_norm=vector(attention + "q_norm.weight") if config.qk_norm else None,
            k_norm=vector(attention + "k_norm.weight") if config.qk_norm else None,
            out=matrix(attention + "o_proj", bias=config.output_bias),
            mlp_norm=vector(at + "post_attention_layernorm.weight"),
            gate_up=matrix(mlp + "gate_proj", mlp + "up_proj", bias=config.mlp_bias),
            down=matrix(mlp + "down_proj", bias=config.mlp_bias),
        )

    embedding = tensors.get("model.embed_tokens.weight").to(device)
    if widen:
        embedding = embedding.to(dtype)
    tied = config.tied or "lm_head.weight" not in names
    head = FrozenMatrix([embedding], None, widening) if tied else matrix("lm_head")
    layers = [layer(index) for index in range(config.num_layers)]
    return Weights(embedding, layers, vector("model.norm.weight"), head)
