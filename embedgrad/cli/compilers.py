"""The compilers behind the kernels, and the pairs of compiler and GPU that are known to make wrong code."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from embedgrad.kernels.launch_row import Row

Version = tuple[int, ...]
ASSEMBLERS = {"ptxas": "TRITON_PTXAS_PATH", "ptxas-blackwell": "TRITON_PTXAS_BLACKWELL_PATH"}
"""NVIDIA's assemblers in Triton's wheel, and the variables that name others."""
_CHECK = "`embedgrad doctor --device cuda` checks the launch rows on this GPU"


@dataclass(frozen=True)
class WrongCode:
    """One report of wrong code.

    It concerns GPUs of `arch` (patterns) whose kernels come from a Triton release from `since` up to but not including
    `until`, and from a ptxas before `ptxas_before`; what is None does not matter. what: goes wrong. here: which of our
    kernels have what it takes. remedy: what a user can do.
    """

    source: str
    arch: tuple[str, ...]
    what: str
    here: str
    remedy: str
    since: Version | None = None
    until: Version | None = None
    ptxas_before: Version | None = None

    def concerns(self, arch: str, triton: Version, ptxas: Version | None) -> bool:
        """Whether this GPU's kernels may be wrong; an assembler of unknown version counts as an old one."""
        return (
            any(fnmatchcase(arch, pattern) for pattern in self.arch)
            and (self.since is None or triton >= self.since)
            and (self.until is None or triton < self.until)
            and (self.ptxas_before is None or ptxas is None or ptxas < self.ptxas_before)
        )


_TENSOR_MEMORY = ("sm_100", "sm_101", "sm_103")
"""The Blackwell GPUs whose products accumulate in tensor memory."""

KNOWN: tuple[WrongCode, ...] = (
    WrongCode(
        "triton #11781, #9433", ("sm_90",), "a product may read its first operand from registers that are in use again",
        "attention (P V, dS K) and the quantised products have such operands",
        f"point {ASSEMBLERS['ptxas']} at a ptxas of CUDA 13.3 or later; {_CHECK}", ptxas_before=(13, 3),
    ),
    WrongCode(
        "flash-linear-attention chunk_o.py", ("sm_90",), "tl.dot(tl.trans(x), y) is wrong where x was computed",
        "no kernel has such a product", "none is needed", since=(3, 4), until=(3, 7, 1),
    ),
    WrongCode(
        "triton #8554", ("sm_*",), "a load that two products use may be overwritten before the second has read it",
        "the attention backward uses q, do and k twice", f"Triton 3.6 or later; {_CHECK}", until=(3, 6),
    ),
    WrongCode(
        "triton #10821, Liger-Kernel #1435", _TENSOR_MEMORY,
        "two products that a loop adds to one accumulator one after the other are wrong",
        "no kernel does so", "none is needed", since=(3, 6), until=(3, 9),
    ),
    WrongCode(
        "triton #9871", _TENSOR_MEMORY, "products with 4 warps in a loop whose length is read from memory vary by run",
        "tree attention has such loops", f"Triton 3.7 or later; {_CHECK}", since=(3, 4), until=(3, 7),
    ),
    WrongCode(
        "triton #11366", ("sm_90",), "several products with 4 warps on small tiles may read outside shared memory",
        "decode attention and the quantised products have 4 warps", _CHECK, since=(3, 7), until=(3, 8),
    ),
)  # fmt: skip


def parsed(version: str) -> Version:
    """The numbers in front of a version: "3.6.0+git12" is (3, 6, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def versions() -> dict[str, Any]:
    """Triton's version, and the path and version of each assembler that it finds. {} without Triton."""
    try:
        import triton
    except ImportError:
        return {}
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found: dict[str, Any] = {"triton": triton.__version__}
    for name, variable in ASSEMBLERS.items():
        path = Path(os.environ.get(variable) or folder / name)
        if path.is_file():
            found[name] = {"path": str(path), "version": _version(path)}
    return found


def _version(assembler: Path) -> str | None:
    try:
        said = subprocess.run([assembler, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"V(\d+\.\d+\.\d+)", said)
    return found[1] if found else None


def assembler(arch: str, found: dict[str, Any]) -> str | None:
    """Which of `found` assembles for an NVIDIA architecture: as this Triton says, else by the rule of its releases."""
    if not arch.startswith("sm_"):
        return None
    number = int(arch.removeprefix("sm_"))
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        told = get_ptxas(number)
        path = str(getattr(told, "path", told[0] if isinstance(told, tuple) else told))
        return next(name for name in ASSEMBLERS if name in found and os.path.samefile(found[name]["path"], path))
    except (ImportError, TypeError, AttributeError, OSError, RuntimeError, StopIteration):
        wanted = "ptxas-blackwell" if number >= 100 else "ptxas"
        return next((name for name in (wanted, "ptxas") if name in found), None)


def warnings(arch: str, found: dict[str, Any], known: tuple[WrongCode, ...] = KNOWN) -> list[str]:
    """What is known against these compilers on a GPU of this architecture, a sentence each."""
    if "triton" not in found:
        return []
    name = assembler(arch, found)
    version = found[name]["version"] if name is not None else None
    by = f"Triton {found['triton']}" + (f" with {name} {version or 'of unknown version'}" if name is not None else "")
    return [
        f"{by} on {arch}: {one.what} ({one.source}). Here: {one.here}. What helps: {one.remedy}."
        for one in known
        if one.concerns(arch, parsed(found["triton"]), parsed(version) if version else None)
    ]


def remarks(arch: str, found: dict[str, Any], rows: tuple[Row, ...]) -> list[str]:
    """Which launch rows of this architecture were tuned with another Triton release, a sentence for each release.

    The best number of warps of one kernel changed by a factor of two in time from 3.6.0 to 3.7.1 (triton #11373).
    """
    if "triton" not in found:
        return []
    by_release: dict[str, list[str]] = {}
    for row in rows:
        if row.tuned is not None and fnmatchcase(arch, row.arch):
            by_release.setdefault(row.tuned.triton, []).append(row.kernel)
    return [
        f"{len(kernels)} launch rows of {arch} were tuned with Triton {release}, and this is {found['triton']}: other "
        f"parameters may be faster for {', '.join(sorted(set(kernels)))}. `python -m bench tune` measures them anew."
        for release, kernels in sorted(by_release.items())
        if parsed(release) != parsed(found["triton"])
    ]
