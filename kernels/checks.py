"""Refusals that every launcher shares: a launch with shapes that do not fit would write where it must not.

Wrong arguments raise ValueError with one sentence. Nothing here reads device memory.
"""

from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def shape(name: str, x: torch.Tensor, expected: Sequence[int]) -> None:
    """x must have exactly this shape."""
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {list(x.shape)}, but must have {list(expected)}")


def floating(**tensors: torch.Tensor) -> None:
    """Each tensor must hold float32, float16 or bfloat16."""
    for name, x in tensors.items():
        if x.dtype not in FLOATS:
            raise ValueError(f"{name} holds {x.dtype}, but must hold float32, float16 or bfloat16")


def writable(**tensors: torch.Tensor) -> None:
    """No two indices of an output may mean the same element: programs would race for it."""
    for name, x in tensors.items():
        if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(f"{name} is written, but is expanded (strides {list(x.stride())})")
