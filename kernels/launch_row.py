"""One row of the launch table: what it is for, and the parameters it gives."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

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
class Tuned:
    """Where `python -m bench tune` measured a row.

    triton: the release that compiled it. device: the GPU's name. date: day and time of day, UTC. microseconds: of one
    call, by shape. before: those of the row that had been in use, in the same run.
    """

    triton: str
    device: str
    date: str
    microseconds: dict[str, float]
    before: dict[str, float]


@dataclass(frozen=True)
class Row:
    """Parameters of one kernel on one architecture, for elements of some widths and a range of sizes.

    kernel: name, as the launcher asks for it; arch: "sm_80", "gfx942", ...; both may be patterns ("sm_*").
    options: constexpr block sizes, num_warps, num_stages (and waves_per_eu on AMD). reason: why these.
    bytes: element sizes this row is for (empty: all). at_most, at_least: inclusive limits on named sizes.
    tuned: of a row that was measured.
    """

    kernel: str
    arch: str
    options: dict[str, int | Fit]
    reason: str
    bytes: tuple[int, ...] = ()
    at_most: dict[str, int] = field(default_factory=dict)
    at_least: dict[str, int] = field(default_factory=dict)
    tuned: Tuned | None = None

    def fits(self, kernel: str, arch: str, dtype: torch.dtype, sizes: dict[str, int]) -> bool:
        return (
            fnmatchcase(kernel, self.kernel)
            and fnmatchcase(arch, self.arch)
            and (not self.bytes or dtype.itemsize in self.bytes)
            and all(name in sizes and sizes[name] <= limit for name, limit in self.at_most.items())
            and all(name in sizes and sizes[name] >= limit for name, limit in self.at_least.items())
        )

    def resolve(self, sizes: dict[str, int]) -> Options:
        return {k: v.value(sizes) if isinstance(v, Fit) else v for k, v in self.options.items()}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (1 for n ≤ 1)."""
    return 1 << max(n - 1, 0).bit_length()
