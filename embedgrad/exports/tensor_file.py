"""Writes safetensors files tensor by tensor, so that a copy of a model never lies in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedgrad.util.errors import ModelError

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_PIECE = 1 << 24  # bytes that are copied at a time


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. kind: its type as safetensors files spell it. pieces: makes its bytes, in order."""

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[Any]]  # of bytes or memoryview


def tensor_entry(name: str, dtype: torch.dtype, shape: Sequence[int], make: Callable[[], Iterable[Tensor]]) -> Entry:
    """An entry of the tensors that `make()` gives, one below the other, each brought to `dtype`."""

    def pieces() -> Iterator[memoryview]:
        for part in make():
            for piece in part.reshape(-1).split(_PIECE // dtype.itemsize):
                yield memoryview(piece.to(dtype).contiguous().view(torch.uint8).numpy())

    return Entry(name, TYPES[dtype], tuple(shape), torch.Size(shape).numel() * dtype.itemsize, pieces)


def stored_entries(path: Path) -> tuple[list[Entry], dict[str, str]]:
    """(the tensors of a safetensors file as they are stored, its metadata). Raises ModelError."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        found = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
        return [_stored(path, 8 + length, name, each) for name, each in found], metadata
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not a readable safetensors file ({error}); fetch it again.") from error


def _stored(path: Path, data: int, name: str, header: Mapping[str, Any]) -> Entry:
    begin, end = header["data_offsets"]

    def pieces() -> Iterator[bytes]:
        with open(path, "rb") as file:
            file.seek(data + begin)
            left = end - begin
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise OSError(f"{path} ends within {name}")
                left -= len(piece)
                yield piece

    return Entry(name, header["dtype"], tuple(header["shape"]), end - begin, pieces)


def write_entries(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Writes the file. It is not atomic: the folder around it is."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": entry.kind, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            before = file.tell()
            for piece in entry.pieces():
                file.write(piece)
            if file.tell() - before != entry.nbytes:
                raise ModelError(f"{entry.name} has another size than its header says; fetch the model again.")
