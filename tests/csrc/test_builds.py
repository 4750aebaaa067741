"""The same tokens whatever the compiler makes of the sources, and no access or arithmetic that C++ leaves undefined."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embedgrad.generation.constrained import ForcedChoice
from embedgrad.generation.sampler import Penalties
from embedgrad.generation.sampling import Sampling
from tests.csrc.core import CSRC, Call, Core, build, compiler

BUILDS = {
    "unoptimised": ["-O0"],
    "contracted for this machine": ["-O3", "-march=native", "-ffp-contract=fast"],
    "undefined behaviour": ["-fsanitize=undefined", "-fno-sanitize-recover=all"],
    "addresses": ["-fsanitize=address", "-g"],
}


SAMPLINGS = (
    Sampling(),
    Sampling(temperature=2, top_k=3, seed=1),
    Sampling(temperature=1, top_p=0.6, min_p=0.02, seed=2),
    Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, seed=3),
)


def answers(core: Core) -> str:
    """Tokens of both devices with every option, of rows whose sizes divide nothing and whose logits are often tied."""
    random = np.random.default_rng(0)
    found = []
    for vocabulary, rows in ((1, 2), (5, 12), (33, 12), (1023, 6), (4099, 1)):
        tree = ForcedChoice.among([[vocabulary - 1, vocabulary // 2], [0, 0, vocabulary - 1], [0, 0, 0]], end=0)
        for options in (
            {},
            {"bias": random.normal(0, 1, vocabulary).astype(np.float32)},
            {"counts": random.integers(0, 4, (rows, vocabulary)), "penalties": Penalties(1.3, 0.37, 0.61)},
            {"choice": tree, "nodes": random.integers(-1, 3, rows).tolist()},
        ):
            logits = random.normal(0, 2, (rows, vocabulary)).astype(np.float32).round()
            for sampling in SAMPLINGS[:: 3 if rows == 1 else 1]:
                found += [core.sample(device, Call(logits, sampling, **options)) for device in ("cpu", "cuda")]
                assert found[-1] == found[-2]
        for device in ("cpu", "cuda"):
            core.token_entropy(device, logits)
    return str(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_same_tokens_from_every_build(core: Core, tmp_path: Path, name: str) -> None:
    flags = BUILDS[name]
    build(tmp_path, flags)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # Python's own are none of ours
    if "-fsanitize=address" in flags:
        asked = [*str(compiler()).split(), "-print-file-name=libasan.so"]
        runtime = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(runtime).is_file():
            pytest.skip("the compiler has no AddressSanitizer runtime to load before Python")
        environment["LD_PRELOAD"] = runtime
    script = "import sys; from tests.csrc.test_builds import *; print(answers(Core(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "libcore.so")],
        env=environment, cwd=CSRC.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == answers(core)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
def test_same_tokens_from_another_compiler(core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "clang++")
    other = Core(build(tmp_path, ["-O2"]))
    assert answers(other) == answers(core)
