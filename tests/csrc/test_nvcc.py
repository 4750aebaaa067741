"""The CUDA sources compile and link with nvcc alone, without spills, for the GPUs that are served."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.core import CSRC, KERNELS

EXPORTED = {f"embedgrad_{name}_cuda" for name in ("sample", "advance", "token_entropy", "problem")}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_compiles_and_links_without_spills(tmp_path: Path, target: str) -> None:
    library = tmp_path / "libembedgrad_cuda.so"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={target}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += ["-Xcompiler", "-fPIC", "-shared", "-o", str(library), *(str(CSRC / f) for f in KERNELS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    spills = re.findall(r"(\d+) bytes spill stores", said)
    assert len(spills) == len(EXPORTED)
    assert set(spills) == {"0"}, said
    symbols = library.read_bytes()
    assert all(name.encode() in symbols for name in EXPORTED)
