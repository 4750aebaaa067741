"""Which model a checkpoint is, told by a few numbers of every layer, however it is stored and loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.model.checkpoint import Checkpoint

_EACH = 8  # numbers of each tensor: some 2,000 of a model with 30 layers
_QUANTISED = 0.3  # relative distance of equal weights of which one is quantised; 2-bit types come near it


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """values: the first numbers of the first row of every matrix and norm, [n] float32. exact: none was quantised."""

    values: Tensor
    exact: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Fingerprint:
        """The fingerprint of an opened checkpoint. It reads one row of each tensor."""
        tensors, held = checkpoint.tensors, set(checkpoint.tensors.names())
        names = [name for name in checkpoint.config.shapes() if name.endswith(".weight") and name in held]
        exact = not any((raw := tensors.stored_as(name)) is not None and raw not in _FLOATS for name in names)
        return cls(torch.cat([tensors.first_row(name)[:_EACH].float() for name in names]), exact)

    def differs(self, other: Fingerprint) -> bool:
        """Whether it is of other weights. Copies rounded to a shorter type, or quantised, are the same weights."""
        one, two = self.values, other.values
        if one.shape != two.shape:
            return True
        if self.exact and other.exact:
            same = one == two
            for kind in _SHORTER:  # each tensor by itself, because a file may have several types
                same |= (one == two.to(kind).float()) | (two == one.to(kind).float())
            return not bool(same.all())
        return float((one - two).norm()) > _QUANTISED * float(one.norm())


_FLOATS = ("F32", "F16", "BF16", "F64")
_SHORTER = (torch.bfloat16, torch.float16)
