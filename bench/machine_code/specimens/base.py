"""What a family of kernels offers: specimens to compile and trials to execute.

    specimens() -> list[Specimen]   calls at the sizes of real models, compiled and never run
    trials() -> list[Trial]         small calls on real values, run in the gfx942 emulator against the reference

Both are plain data with functions. They call operations of the triton backend.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.machine_code.capture import Launch
from embedgrad.backends.base import Backend

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one specimen, by count.

    least: bytes when every input is read once and every output written once. moved: bytes that the programs ask for,
    counted by tiles, without caches. useful: operations (a multiply-add is two) that the result needs. done: operations
    that the tiles perform. The last two count matrix products where there are any, and other arithmetic elsewhere.
    """

    least: int
    moved: int
    useful: int
    done: int


@dataclass(frozen=True)
class Specimen:
    """One operation at one real size.

    model: whose sizes. dtype: of the activations. run: one call, on tensors whose float memory is never touched. cost:
    from the launches of that call. matrix: there must be matrix instructions (16-bit types). streaming: memory-bound,
    so there must be 128-bit loads. helpers: names of kernels (as captured) that `matrix` and `streaming` do not speak
    of. in_place: some output is an input.
    """

    op: str
    model: str
    dtype: torch.dtype
    run: Callable[[], object]
    cost: Callable[[list[Launch]], Cost]
    matrix: bool = False
    streaming: bool = False
    in_place: bool = False
    helpers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op}/{self.model}/{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Trial:
    """One small call whose gfx942 code is executed.

    inputs: makes float64 (and integer) tensors from a seed, which are cast to the type under test. run: the call's
    outputs by name, on a backend and inputs; the reference in float64 gives the truth. useful: operations of the matrix
    products in the result. tolerance: of the three-way rule, by output type, instead of half a unit in the last place.
    types: to try it in.
    """

    op: str
    case: str
    inputs: Callable[[int], dict[str, Tensor]]
    run: Callable[[Backend, Tensors], dict[str, Tensor]]
    useful: int = 0
    tolerance: Mapping[torch.dtype, float] | None = None
    types: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)

    @property
    def name(self) -> str:
        return f"{self.op}/{self.case}"
