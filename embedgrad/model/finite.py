"""Refuses weights that hold NaN or infinity: a file may be whole by its index and still hold such numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embedgrad.kernels.packing import PackedWeight
from embedgrad.model.quantised import BlockWeight, TileWeight
from embedgrad.util.errors import ModelError

SAMPLED = 64  # rows of a mapped matrix that are looked at; reading all of it would bring the whole file into memory


def check_all(name: str, tensor: Tensor, where: str) -> Tensor:
    """`tensor`, every element of which was looked at. Raises ModelError where one is NaN or infinite.

    name, where: of the tensor and its model, for the message. This takes as long as reading the memory once.
    """
    if tensor.numel() and not tensor.is_meta and not _is_finite(tensor):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ModelError(
            f"{where}: {name} holds NaN or infinity as {kind}, with which every loss and answer is meaningless; fetch "
            "the file again, or export it once more."
        )
    return tensor


def check_sample(name: str, part: Any, where: str) -> Any:
    """The part of a matrix `part`, of which SAMPLED rows were looked at; of packed weights, all scales and offsets.

    Raises ModelError where a number is NaN or infinite.
    """
    if isinstance(part, PackedWeight):
        for tensor in (part.scales, part.offsets):
            if tensor is not None:
                check_all(name, tensor, where)
        return part
    rows = torch.linspace(0, part.shape[0] - 1, min(SAMPLED, part.shape[0]), dtype=torch.float64).long()
    if isinstance(part, BlockWeight | TileWeight):
        check_all(name, part.gather(rows), where)
    else:
        check_all(name, part[rows.to(part.device)], where)
    return part


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. It looks at the extremes only; a NaN becomes both of them."""
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() & high.isfinite())
