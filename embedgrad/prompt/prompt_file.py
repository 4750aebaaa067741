"""The prompt file: a safetensors file (tensors and texts, no code) with a checksum over its contents."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from embedgrad.util.errors import PromptError
from embedgrad.util.files import write_atomic
from embedgrad.util.shown import first_line, short
from embedgrad.util.tensor_bytes import unpack

FORMAT = "embedgrad-prompt"
VERSION = "1"
_TYPES = {torch.float32: ("F32", "<f4"), torch.float64: ("F64", "<f8"), torch.int64: ("I64", "<i8")}
MAX_BYTES = 1 << 32  # 4 GiB: 64,000 prompt rows at hidden size 8,192; the file is read into memory as a whole


def write_prompt_file(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], fields: Mapping[str, str]
) -> None:
    """Writes named tensors (float32, float64, int64) and named texts, whole or not at all. Raises SaveError."""
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {name: json.dumps(value) for name, value in fields.items()}
    metadata |= {"format": FORMAT, "version": VERSION}
    metadata["checksum"] = _checksum(packed, metadata)
    write_atomic(path, _pack(packed, metadata))


def read_prompt_file(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, texts) by name, as they were written. Raises PromptError for a damaged file or another kind of file."""
    data = _read(Path(path))
    try:
        tensors, metadata = unpack(data)
    except ValueError as error:
        raise PromptError(f"{path} is not a readable safetensors file ({first_line(error)}).") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise PromptError(f"{path} is a safetensors file, but not a prompt file of embedgrad.")
    if metadata.get("version") != VERSION:
        raise PromptError(
            f"{path} has version {short(metadata.get('version'))} of the prompt format; embedgrad reads {VERSION}."
        )
    checksum = metadata.pop("checksum", None)
    if checksum != _checksum(tensors, metadata):
        raise PromptError(f"{path} is damaged: its contents do not match its checksum.")
    try:
        fields = {name: json.loads(text) for name, text in metadata.items() if name not in ("format", "version")}
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path} has metadata that is not JSON ({first_line(error)}).") from error
    if not all(isinstance(text, str) for text in fields.values()):
        raise PromptError(f"{path} has metadata that is not text.")
    return tensors, fields


def _pack(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file. Equal contents give equal bytes.

    The writer of the safetensors package does not do this: the order of its metadata changes from call to call.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    pieces: list[bytes] = []
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        pieces.append(tensor.numpy().astype(_TYPES[tensor.dtype][1], copy=False).tobytes())
        start, end = end, end + len(pieces[-1])
        header[name] = {"dtype": _TYPES[tensor.dtype][0], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces])


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise PromptError(f"{path} is not a file.")
        if size > MAX_BYTES:
            raise PromptError(f"{path} has {size:,} bytes; a prompt file has at most {MAX_BYTES:,}.")
        data = path.read_bytes()
    except FileNotFoundError:
        raise PromptError(f"there is no prompt file {path}.") from None
    except (OSError, ValueError) as error:
        raise PromptError(f"the prompt file {path} cannot be read: {first_line(error)}.") from error
    if not data:
        raise PromptError(f"the prompt file {path} is empty.")
    return data


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> str:
    """sha256 (hexadecimal) over the metadata as sorted JSON and each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
