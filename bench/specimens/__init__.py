"""What the kernel benches and their tests run: one declarative list per family of kernels.

To add a kernel, add entries to the module of its family here (or a new module, named in FAMILIES); `kernels/` itself
knows nothing of benches. A family module offers

    specimens() -> list[Specimen]   launches at the sizes of real models, compiled but never run: `run()` calls the
                                    launcher once on tensors whose float memory is never touched (`shapes.untouched`);
                                    signature, constants, grid and launch parameters are captured from that call
    trials() -> list[Trial]         small launches on real values, run in the gfx942 emulator against the reference

Both are plain data with functions; nothing is imported from here by the project.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from bench.capture import Launch

FAMILIES = ("rowwise", "attention", "products")

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one specimen, by count.

    least: bytes when every input is read once and every output written once. moved: bytes that the programs ask for,
    counted by tiles, caches ignored. useful: operations (a multiply-add is two) the result needs. done: operations
    the tiles perform. Both count matrix products alone where there are any, and other arithmetic where there are none.
    """

    least: int
    moved: int
    useful: int
    done: int


@dataclass(frozen=True)
class Specimen:
    """One launcher at one real size.

    op: name of the launcher; model: whose sizes; dtype: of the activations. cost: from the captured launches.
    matrix: matrix instructions must be there (16-bit types). streaming: memory-bound, so 128-bit loads must be there.
    kernels: names of the kernels (as captured) that `matrix` and `streaming` speak of; empty: all of them.
    in_place: some output is an input.
    """

    op: str
    model: str
    dtype: torch.dtype
    run: Callable[[], object]
    cost: Callable[[list[Launch]], Cost]
    matrix: bool = False
    streaming: bool = False
    in_place: bool = False
    kernels: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op}/{self.model}/{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Trial:
    """One small case whose gfx942 code is executed.

    inputs: makes float64 (and integer) tensors from a seed; they are cast to the type under test. kernel: calls the
    launcher on inputs of that type and returns its outputs by name. reference: the same outputs in plain torch, in
    whatever type the inputs have; in float64 it is the truth. useful: operations of the matrix products in the result.
    tolerance: of the three-way rule per output type, instead of half a unit in the last place. types: to try it in.
    """

    op: str
    case: str
    inputs: Callable[[int], dict[str, Tensor]]
    kernel: Callable[[Tensors], dict[str, Tensor]]
    reference: Callable[[Tensors], dict[str, Tensor]]
    useful: int = 0
    tolerance: Mapping[torch.dtype, float] | None = None
    types: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)

    @property
    def name(self) -> str:
        return f"{self.op}/{self.case}"


def specimens() -> list[Specimen]:
    """Every specimen of every family."""
    return [s for family in FAMILIES for s in import_module(f"bench.specimens.{family}").specimens()]


def trials() -> list[Trial]:
    """Every trial of every family."""
    return [t for family in FAMILIES for t in import_module(f"bench.specimens.{family}").trials()]
