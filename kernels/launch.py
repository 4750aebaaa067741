"""Launch parameters: block sizes, warps and pipeline stages of each kernel, by architecture, type and size.

A launcher asks for the parameters by the kernel's name and passes them on::

    arch = launch.architecture(q.device)  # "sm_90", "gfx942", ...; "interpreter" when Triton interprets
    options = launch.options("tree_attention_forward", arch, dtype=q.dtype, head_dim=128)
    grid = (triton.cdiv(T, options["BLOCK_Q"]), heads)
    launch.run(_forward, grid, ..., **options)  # BLOCK_Q, BLOCK_K, num_warps, num_stages

The parameters are data (launch_table.py), every row with its reason; the first row that fits wins, and `heuristic`
answers where none does. A size a kernel is asked about (head_dim, width, ...) selects a row and never becomes a
constexpr by itself, so a new length compiles nothing new.

Tests replace parameters with `launch.overridden(name, BLOCK_Q=16)`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from .launch_row import Options, Row, power_of_two
from .launch_table import ROWS, heuristic

__all__ = [
    "Launch", "Options", "architecture", "interpreted", "observed", "options", "overridden", "power_of_two",
    "pretending", "recorded", "run",
]  # fmt: skip


def interpreted() -> bool:
    """Whether Triton interprets kernels in this process (decided when it was imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_pretended: list[str] = []


@contextmanager
def pretending(arch: str) -> Iterator[None]:
    """Inside, every device is of this architecture: for compiling ahead of time and for emulators."""
    _pretended.append(arch)
    try:
        yield
    finally:
        _pretended.pop()


def architecture(device: torch.device) -> str:
    """The name that rows use: "sm_90", "gfx942", or "interpreter" where no machine code runs."""
    if _pretended:
        return _pretended[-1]
    if interpreted() or device.type == "cpu":
        return "interpreter"
    return _gpu_architecture(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _gpu_architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


_overrides: dict[str, Options] = {}


@contextmanager
def overridden(kernel: str, **options: int) -> Iterator[None]:
    """Inside, these parameters of this kernel replace whatever the table says (for tests and benchmarks)."""
    before = _overrides.get(kernel)
    _overrides[kernel] = {**(before or {}), **options}
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before


def options(kernel: str, arch: str, *, dtype: torch.dtype, **sizes: int) -> Options:
    """Block sizes, num_warps and num_stages for one launch.

    kernel: a name of the table (launch_table.py lists them with their keys). arch: see `architecture`.
    dtype: of the elements that fill the tiles. sizes: what the table may depend on (head_dim, width, ...).
    Raises KeyError for a kernel that neither the table nor the heuristic knows.
    """
    found, row = _looked_up(kernel, arch, dtype, tuple(sorted(sizes.items())))
    for used in _observers:
        used.append((kernel, row))
    return {**found, **_overrides.get(kernel, {})}


@lru_cache(maxsize=4096)
def _looked_up(
    kernel: str, arch: str, dtype: torch.dtype, sizes: tuple[tuple[str, int], ...]
) -> tuple[Options, Row | None]:
    named = dict(sizes)
    row = next((row for row in ROWS if row.fits(kernel, arch, dtype, named)), None)
    return heuristic(kernel, arch, dtype.itemsize, named) if row is None else row.resolve(named), row


_observers: list[list[tuple[str, Row | None]]] = []


@contextmanager
def observed() -> Iterator[list[tuple[str, Row | None]]]:
    """The (kernel, row) of every lookup made inside; None stands for the heuristic."""
    used: list[tuple[str, Row | None]] = []
    _observers.append(used)
    try:
        yield used
    finally:
        _observers.remove(used)


Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""A kernel, its grid, its arguments and its constants."""

_recorders: list[Callable[[Launch], bool]] = []


@contextmanager
def recorded(recorder: Callable[[Launch], bool]) -> Iterator[None]:
    """Inside, `recorder` gets every launch before it happens; it happens only where `recorder` returns True."""
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.remove(recorder)


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch `kernel` on `grid`: every launch of this package goes through here."""
    for recorder in _recorders:
        if not recorder((kernel, grid, arguments, constants)):
            return
    kernel[grid](*arguments, **constants)
