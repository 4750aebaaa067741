"""One call of one kernel: inputs, outputs, the kernel's way and plain torch's way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.kernels import launch

Tensors = dict[str, Tensor]
SEED = 0


@dataclass(frozen=True)
class Case:
    """What a row of the launch table is checked and timed on.

    kernel: name in the launch table. text: the shape in words. dtype, sizes: element type and sizes for the lookup in
    the launch table. inputs: makes them on a device, the same ones at every call. fresh: outputs for such inputs, full
    of NaN, or copies where an operation works in place. run: the kernel, which writes the outputs. plain: the same in
    plain torch for inputs of any float type, float64 included. warm: time it with its data in the L2 cache, because it
    is so small that a step finds it there. read: what the kernel has left in its outputs.
    """

    kernel: str
    text: str
    dtype: torch.dtype
    sizes: dict[str, int]
    inputs: Callable[[torch.device], Tensors]
    fresh: Callable[[Tensors], Tensors]
    run: Callable[[Tensors, Tensors], None]
    plain: Callable[[Tensors, Tensors], None]
    warm: bool = False
    read: Callable[[Tensors], Tensors] = dict

    def options(self, device: torch.device) -> launch.Options:
        """The launch parameters in force for this case on a device."""
        return launch.options(self.kernel, launch.architecture(device), dtype=self.dtype, **self.sizes)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers on the generator's device."""
    return (torch.randn(shape, generator=generator, device=generator.device) * scale).to(dtype)


def seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(SEED)


def poisoned(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An output on the device of `like`, NaN everywhere, in its type unless one is named."""
    return torch.full(shape or like.shape, float("nan"), dtype=dtype or like.dtype, device=like.device)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
