"""Launch parameters: block sizes, warps and pipeline stages of each kernel, by architecture, type and size.

A launcher asks for the parameters by the kernel's name and passes them on::

    arch = launch.architecture(q.device)  # "sm_90", "gfx942", ...; "interpreter" when Triton interprets
    options = launch.options("tree_attention_forward", arch, dtype=q.dtype, head_dim=128)
    grid = (triton.cdiv(T, options["BLOCK_Q"]), heads)
    _forward[grid](..., **options)  # BLOCK_Q, BLOCK_K, num_warps, num_stages

The parameters are data (launch_table.py), every row with its reason; the first row that fits wins, and `heuristic`
answers where none does. A size a kernel is asked about (head_dim, width, ...) selects a row and never becomes a
constexpr by itself, so a new length compiles nothing new.

Autotuning happens only where the environment variable EMBEDGRAD_AUTOTUNE is 1, only on a GPU, and never for the kernels
in launch_table.IN_PLACE: each trial would change the data (triton issue 6547). A launcher that can be tuned hands over
its launch as a function; without the variable this is `options` and one call::

    launch.start(name, device, lambda options: _forward[grid(options)](..., **options), dtype=q.dtype, head_dim=128)

Tests replace parameters with `launch.overridden(name, BLOCK_Q=16)`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache

import torch

Options = dict[str, int]


@dataclass(frozen=True)
class Fit:
    """The smallest power of two that is at least the named size, kept within [low, high]."""

    size: str
    low: int = 16
    high: int = 1 << 16

    def value(self, sizes: dict[str, int]) -> int:
        if self.size not in sizes:
            raise KeyError(f"launch parameters need the size {self.size!r}; given: {sorted(sizes)}")
        return min(max(power_of_two(sizes[self.size]), self.low), self.high)


@dataclass(frozen=True)
class Row:
    """Parameters of one kernel on one architecture, for elements of some widths and sizes up to a limit.

    kernel: name, as the launcher asks for it; arch: "sm_80", "gfx942", ...; both may be patterns ("sm_*").
    options: constexpr block sizes, num_warps, num_stages (and waves_per_eu on AMD). reason: why these.
    bytes: element sizes this row is for (empty: all). at_most: inclusive limits on named sizes.
    """

    kernel: str
    arch: str
    options: dict[str, int | Fit]
    reason: str
    bytes: tuple[int, ...] = ()
    at_most: dict[str, int] = field(default_factory=dict)

    def fits(self, kernel: str, arch: str, dtype: torch.dtype, sizes: dict[str, int]) -> bool:
        return (
            fnmatchcase(kernel, self.kernel)
            and fnmatchcase(arch, self.arch)
            and (not self.bytes or dtype.itemsize in self.bytes)
            and all(name in sizes and sizes[name] <= limit for name, limit in self.at_most.items())
        )

    def resolve(self, sizes: dict[str, int]) -> Options:
        return {k: v.value(sizes) if isinstance(v, Fit) else v for k, v in self.options.items()}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (1 for n ≤ 1)."""
    return 1 << max(n - 1, 0).bit_length()


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
    from .launch_table import ROWS, heuristic

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


def candidates(kernel: str, arch: str, *, dtype: torch.dtype, **sizes: int) -> list[Options]:
    """What autotuning tries: this launch's parameters first, then every other row of the kernel for these sizes."""
    from .launch_table import ROWS

    wanted = [options(kernel, arch, dtype=dtype, **sizes)]
    for row in ROWS:
        if row.fits(kernel, row.arch, dtype, sizes) and row.arch != "interpreter":
            choice = {**wanted[0], **row.resolve(sizes)}
            if choice not in wanted and choice.keys() == wanted[0].keys():
                wanted.append(choice)
    return wanted


_tuned: dict[tuple[str, str, torch.dtype, tuple[tuple[str, int], ...]], Options] = {}


def start(
    kernel: str, device: torch.device, run: Callable[[Options], None], *, dtype: torch.dtype, **sizes: int
) -> None:
    """Launch `run(options)`; where EMBEDGRAD_AUTOTUNE=1 and the kernel permits it, with the fastest candidate.

    The choice is kept for this process by kernel, architecture, type and sizes. Tuning synchronises the device and runs
    the kernel many times, so it is never the default.
    """
    from .launch_table import IN_PLACE

    arch = architecture(device)
    tunable = os.environ.get("EMBEDGRAD_AUTOTUNE") == "1" and device.type == "cuda" and kernel not in IN_PLACE
    if not tunable or interpreted():
        run(options(kernel, arch, dtype=dtype, **sizes))
        return
    key = (kernel, arch, dtype, tuple(sorted(sizes.items())))
    if key not in _tuned:
        _tuned[key] = _fastest(run, candidates(kernel, arch, dtype=dtype, **sizes))
    run(_tuned[key])


def _fastest(run: Callable[[Options], None], tries: list[Options]) -> Options:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times: list[tuple[float, int]] = []
    for i, choice in enumerate(tries):
        try:
            times.append((float(do_bench(lambda choice=choice: run(choice))), i))
        except OutOfResources:
            continue
    return tries[min(times)[1]] if times else tries[0]
