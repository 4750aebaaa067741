"""A training step's kernels under sanitizers, with memory that is too small, and for ARM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.csrc.core import compiler
from tests.csrc.programs import BUILDS, SANITIZERS, Program, planted, run_program

PROGRAM = Program(
    "kernels_main.cpp",
    tuple(f"cpu/{x}.cpp" for x in ("embedding", "prompt_step", "rowwise", "softmax_loss", "tree_attention")),
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")]


@pytest.mark.parametrize("name", BUILDS)
def test_every_instruction_set_and_number_of_threads_agrees(tmp_path: Path, name: str) -> None:
    done = run_program(PROGRAM.built(tmp_path, BUILDS[name]))
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    assert int(done.stdout.split()[0]) >= 1


def test_memory_that_is_too_small_is_found(tmp_path: Path) -> None:
    """A block whose spare rows are forgotten where memory is counted writes behind it."""
    sound = "padded_to_panels((rows + kSpareRows) * (wide + 2) + 7 * 16)"
    csrc = planted(tmp_path, "cpu/tree_attention.cpp", sound, "padded_to_panels(rows * (wide + 2))")
    done = run_program(PROGRAM.built(tmp_path, SANITIZERS["addresses"], csrc))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_they_compile_for_arm_and_run_there(tmp_path: Path) -> None:
    done = PROGRAM.on_arm(tmp_path, ["-O3", "-fopenmp"])
    if done is None:
        return
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-1000:]
    assert done.stdout.split()[0] == "1"
