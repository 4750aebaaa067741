"""The generation loop under sanitizers, with a planted race, and compiled for ARM."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedgrad.model.quantised import QUANTISED
from tests.csrc.core import compiler
from tests.csrc.programs import BUILDS, SANITIZERS, Program, planted, run_program

PROGRAM = Program(
    "decode_main.cpp",
    (
        "cpu/sampler.cpp", "decode/linear.cpp", "decode/repack.cpp", "decode/decoder.cpp", "decode/loop.cpp",
        "decode/api.cpp",
    ),
)  # fmt: skip
ANSWERS = 4 * (1 + len(QUANTISED))  # for an instruction set: two models, greedy and sampled, in float32 and every type

pytestmark = [pytest.mark.slow, pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")]


def test_same_answers_from_every_build_and_number_of_threads(tmp_path: Path) -> None:
    said = {}
    for name, flags in BUILDS.items():
        (tmp_path / name).mkdir()
        done = run_program(PROGRAM.built(tmp_path / name, flags))
        assert done.returncode == 0, f"{name}: {done.stdout[-300:]} {done.stderr[-3000:]}"
        said[name] = done.stdout
    sets, *answers = said["plain"].splitlines()
    assert len(answers) == ANSWERS * int(sets)
    assert len(set(said.values())) == 1, said


def test_a_missing_wait_is_found(tmp_path: Path) -> None:
    """Threads that do not wait for each other's rows of q, k and v are a race, and ThreadSanitizer says so."""
    sound = "qkv.begin, qkv.end);\n        team.wait();\n"
    csrc = planted(tmp_path, "decode/decoder.cpp", sound, sound.replace("        team.wait();\n", ""))
    done = run_program(PROGRAM.built(tmp_path, SANITIZERS["threads"], csrc))
    assert done.returncode == 66, done.stderr[-1000:]
    assert "data race" in done.stderr


def test_it_compiles_for_arm_and_runs_there(tmp_path: Path) -> None:
    """The plain vectors become NEON ones; with qemu's user emulation the program runs, too."""
    done = PROGRAM.on_arm(tmp_path, ["-O2"])
    if done is None:
        return
    assert done.returncode == 0, done.stderr[-1000:]
    sets, *answers = done.stdout.splitlines()
    assert sets == "1"
    assert len(answers) == ANSWERS
