"""The emulation reports a missing barrier: in planted kernels, and for every barrier that our kernels have."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedgrad.generation.sampling import Sampling
from tests.csrc.core import CSRC, KERNELS, Call, Core, P, build

T = np.arange(64)
KERNEL_FILES = (*KERNELS, "cuda/block_collectives.cuh")
# What a missing barrier looks like depends on who comes first.
MISSING = "race: .* no barrier between|is read that this block has not written|an atomic .* that was not written"
PLANTED = {  # kernel: what it computes, what is said about the fault
    "neighbour": (10 * ((T + 1) % 64), MISSING),
    "lane_neighbour": (10 * (T // 32 * 32 + (T + 1) % 32), MISSING),
    "reuse": (T * 0 + 1, MISSING),
    "branch": (T, "for threads that never arrive"),
    "collective": (T // 32 * 32, "for threads that never arrive"),
    "count": (T * 0 + 64, "that was not written"),
    "past_the_end": (T, "index 64 of a shared array of 64"),
}


@pytest.fixture(scope="module")
def faults(has_compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Core:
    return Core(build(tmp_path_factory.mktemp("faults"), kernels=[Path(__file__).with_name("faults.cu")]))


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_planted_fault_is_reported_and_its_repair_is_not(faults: Core, name: str, seed: int) -> None:
    faults.lib.embedgrad_emulation_seed(seed)
    expected, message = PLANTED[name]
    out = np.full(64, -1, np.int32)
    kernel = getattr(faults.lib, f"{name}_fault")
    kernel(0, P(out.ctypes.data))
    assert faults.emulation_error() == ""
    assert out.tolist() == expected.tolist()
    kernel(1, P(out.ctypes.data))
    assert re.search(message, faults.emulation_error())


def barriers() -> list[tuple[str, int]]:
    """File and line of every barrier in our kernels."""
    return [
        (name, number)
        for name in KERNEL_FILES
        for number, line in enumerate((CSRC / name).read_text().splitlines())
        if "__syncthreads();" in line
    ]


def without_barrier(folder: Path, name: str, line: int) -> Core:
    """The core whose file `name` lacks the barrier in `line`."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    lines = (csrc / name).read_text().splitlines()
    lines[line] = lines[line].replace("__syncthreads();", "")
    (csrc / name).write_text("\n".join(lines))
    return Core(build(folder, csrc=csrc))


def run_every_kernel(core: Core) -> str:
    """Runs all that has barriers, on blocks of one and of several warps' worth of work; the first fault."""
    random = np.random.default_rng(1)
    found = []
    try:
        logits = random.normal(0, 2, (2, 500)).astype(np.float32).round(1)
        for sampling in (Sampling(), Sampling(temperature=1), Sampling(temperature=1, top_k=50, top_p=0.9, min_p=0.01)):
            core.sample("cuda", Call(logits, sampling))
        core.token_entropy("cuda", logits)
    except AssertionError as fault:
        found.append(str(fault))
    return "".join(found) or core.emulation_error()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "line"), barriers())
def test_every_barrier_is_needed_and_missed(has_compiler: None, tmp_path: Path, name: str, line: int) -> None:
    assert re.search(MISSING, run_every_kernel(without_barrier(tmp_path, name, line)))


def test_a_barrier_missing_in_the_sampler_is_reported(has_compiler: None, tmp_path: Path) -> None:
    name, line = next(b for b in barriers() if b[0] == "cuda/sampler.cu")
    assert re.search(MISSING, run_every_kernel(without_barrier(tmp_path, name, line)))


def test_our_kernels_run_without_a_fault(core: Core) -> None:
    for seed in range(3):
        core.lib.embedgrad_emulation_seed(seed)
        assert run_every_kernel(core) == ""
