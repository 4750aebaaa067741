"""Writes GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), tensor by tensor."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from embedgrad.exports.tensor_file import Entry

ALIGNMENT = 32  # the format's default
_TYPES = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?")}
_STRING, _ARRAY = 8, 9
_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_Q8_BLOCK = 32
_SCALES = np.linspace(0.96, 1.02, 25, dtype=np.float32)  # of the usual scale of a Q8_0 block; the best one is taken


@dataclass(frozen=True)
class Typed:
    """A value of the metadata. kind: u32, i32, f32, bool, str, or [kind] for a list."""

    kind: str
    value: Any

    def encoded(self) -> bytes:
        """The number of the type and the value, as the file has them."""
        if self.kind.startswith("["):
            inner = self.kind[1:-1]
            items = [_encoded(inner, item) for item in self.value]
            return struct.pack("<IIQ", _ARRAY, _number(inner), len(items)) + b"".join(items)
        return struct.pack("<I", _number(self.kind)) + _encoded(self.kind, self.value)


def _number(kind: str) -> int:
    return _STRING if kind == "str" else _TYPES[kind][0]


def _encoded(kind: str, value: Any) -> bytes:
    if kind == "str":
        text = str(value).encode()
        return struct.pack("<Q", len(text)) + text
    return struct.pack(_TYPES[kind][1], value)


def write_gguf_file(path: Path, pairs: Mapping[str, bytes], tensors: Sequence[Entry], alignment: int) -> None:
    """pairs: encoded values by key, in the file's order. An entry's kind is the name of a ggml type."""
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(pairs))]
    for key, value in pairs.items():
        head += [_encoded("str", key), value]
    offset = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        kind = GGMLQuantizationType[tensor.kind].value
        layout = f"<I{len(sizes)}QIQ"
        head += [_encoded("str", tensor.name), struct.pack(layout, len(sizes), *sizes, kind, offset)]
        offset += -(-tensor.nbytes // alignment) * alignment
    with open(path, "wb") as file:
        file.write(b"".join(head))
        _pad(file, alignment)
        for tensor in tensors:
            for piece in tensor.pieces():
                file.write(piece)
            _pad(file, alignment)


def _pad(file: Any, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))


def nbytes(kind: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a ggml type."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return torch.Size(shape).numel() // values * size


def plain_kind(dtype: torch.dtype) -> str:
    """The ggml type of a float type; F32 for float64."""
    return _PLAIN.get(dtype, "F32")


def stored_rows(rows: Tensor, kind: str, *, exact: bool = False) -> np.ndarray:
    """`rows` [n, d] as bytes of a ggml type, uint8 [n, bytes per row]. exact: search the scales of Q8_0 blocks."""
    plain = next((dtype for dtype, name in _PLAIN.items() if name == kind), None)
    if plain is not None:
        return rows.to(plain).contiguous().view(torch.uint8).numpy().reshape(len(rows), -1)
    values = rows.float().contiguous().numpy()
    if kind == "Q8_0" and exact:
        return _best_q8(values)
    return quantize(values, GGMLQuantizationType[kind]).reshape(len(rows), -1)


def _best_q8(rows: np.ndarray) -> np.ndarray:
    """Q8_0 blocks with the scale of least squared error. A block is a float16 scale and 32 signed bytes."""
    blocks = rows.reshape(-1, _Q8_BLOCK)
    usual = np.abs(blocks).max(axis=1, keepdims=True) / 127
    best_error = np.full((len(blocks), 1), np.inf, np.float32)
    best_scale, best = np.zeros((len(blocks), 1), np.float16), np.zeros(blocks.shape, np.int8)
    for factor in _SCALES:
        scale = (usual * factor).astype(np.float16)
        wide = scale.astype(np.float32)
        q = np.clip(np.rint(np.divide(blocks, wide, out=np.zeros_like(blocks), where=wide > 0)), -127, 127)
        error = np.square(q * wide - blocks).sum(axis=1, keepdims=True)
        better = error < best_error
        best_error, best_scale = np.where(better, error, best_error), np.where(better, scale, best_scale)
        best = np.where(better, q.astype(np.int8), best)
    parts = [best_scale.view(np.uint8).reshape(-1, 2), best.view(np.uint8)]
    return np.concatenate(parts, axis=1).reshape(len(rows), -1)
