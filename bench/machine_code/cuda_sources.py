"""What nvcc makes of the CUDA sources in csrc/cuda: registers, spills and shared memory of each kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from bench.harness.rows import ROOT, Row, row

SOURCES = ROOT / "csrc/cuda"
ARCHES = ("sm_80", "sm_90", "sm_100")
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def rows(arches: tuple[str, ...] = ARCHES) -> list[Row]:
    """One row for each kernel and target; none, with a line that says so, where there is no nvcc."""
    if shutil.which("nvcc") is None:
        print("the CUDA sources are left out: nvcc is not installed.")
        return []
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    told = re.search(r"release [\d.]+, V([\d.]+)", version)
    found = []
    for source in sorted(SOURCES.glob("*.cu")):
        for arch in arches:
            found += _compiled(source, arch, f"nvcc {told[1] if told else 'unknown'}")
    return found


def _compiled(source: Path, arch: str, version: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c++17", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-cubin", "-o", f"{folder}/out"]
        done = subprocess.run(["nvcc", *flags, str(source)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"nvcc does not compile {source.name} for {arch}:\n{done.stderr}")
    found = []
    for match in KERNEL.finditer(done.stderr):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(row(
            "kernels", _plain(match["name"]), version, [float(match["registers"])], counted=True, unit="registers",
            case={"part": "cuda", "source": source.name, "arch": arch},
            spills=int(match["stores"]) + int(match["loads"]), stack=int(match["stack"]),
            shared=int(shared[1]) if shared else 0,
        ))  # fmt: skip
    return found


def _plain(mangled: str) -> str:
    """The last part of a mangled name that ends in "kernel"."""
    names = re.findall(r"\d([a-z_]+)_kernel", mangled)
    return names[-1] if names else mangled
