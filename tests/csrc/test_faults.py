"""Faults planted into the sources, one at a time: each must change an answer, or the tests would not see it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csrc.core import CSRC, Core, build
from tests.csrc.test_builds import answers

MATHS, CPU_SAMPLER, CUDA_SAMPLER = "common/sampling.h", "cpu/sampler.cpp", "cuda/sampler.cu"
FAULTS = [  # file, what stands there, what is put in its place
    ("common/philox.h", "round < 10", "round < 9"),
    ("common/philox.h", "c1 ^ key0", "c1 ^ key1"),
    (MATHS, "x > 0 ? x / repetition : x * repetition", "x / repetition"),
    (MATHS, "double(count) * frequency", "frequency"),
    (MATHS, "x -= presence", "x += presence"),
    (MATHS, "x += bias[id]", "x -= bias[id]"),
    (MATHS, "k == key && place <= last", "k == key"),
    (MATHS, "k == key && place <= last", "false"),
    (MATHS, "(missing + unit - 1) / unit", "missing / unit + 1"),
    (MATHS, "params[s].seed, batch.streams[s]", "params[s].seed, 0"),
    (MATHS, "least ? least : 1", "least + (uint64_t{1} << 36)"),
    (MATHS, "(total >> 32) * part", "(total >> 32) * part / 2"),
    (MATHS, "batch.child_tokens + batch.children[node]", "batch.child_tokens"),
    (CPU_SAMPLER, "if (key > highest)", "if (key >= highest)"),
    (CPU_SAMPLER, "missing -= scored.weight[i++]", "missing -= scored.weight[++i]"),
    (CPU_SAMPLER, "missing -= scored.histogram[bin--]", "--bin"),
    (CUDA_SAMPLER, "params.top_k < n", "params.top_k < n - 1000"),
    (CUDA_SAMPLER, "missing - before;", "missing;"),
    (CUDA_SAMPLER, "lane() == __ffs(reached) - 1", "lane() == __ffs(reached) % 32"),
    (CUDA_SAMPLER, "(0xffffffffu - static_cast<uint32_t>(i))", "static_cast<uint32_t>(i)"),
    (CUDA_SAMPLER, "before = __shfl_sync(kAllLanes, running, 31)", "before = running"),
    ("cuda/block_collectives.cuh", "if (lane() >= step)", "if (lane() > step)"),
    ("cuda/block_collectives.cuh", "for (int w = 0; w < warp(); ++w)", "for (int w = 1; w < warp(); ++w)"),
]


@pytest.fixture(scope="module")
def expected(core: Core) -> str:
    return answers(core)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "right", "wrong"), FAULTS)
def test_fault_changes_an_answer(expected: str, tmp_path: Path, name: str, right: str, wrong: str) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    text = (csrc / name).read_text()
    assert text.count(right) == 1, f"{right!r} is no longer in {name}, or not once"
    (csrc / name).write_text(text.replace(right, wrong))
    library = build(tmp_path, csrc=csrc)
    script = "import sys; from tests.csrc.test_builds import *; print(answers(Core(sys.argv[1])))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(library)],
            cwd=CSRC.parent, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return  # it never ended
    assert done.returncode != 0 or done.stdout.strip() != expected
