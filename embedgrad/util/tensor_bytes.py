"""Safetensors files as bytes: the tensors, and the metadata, which the package's `load` leaves out."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load


def unpack(data: bytes) -> tuple[dict[str, torch.Tensor], Any]:
    """(tensors by name, metadata as they are in the header; None where there are none).

    Raises ValueError where `data` is not a safetensors file.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return tensors, header.get("__metadata__")
    except (SafetensorError, KeyError, TypeError, RecursionError, RuntimeError, AttributeError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
