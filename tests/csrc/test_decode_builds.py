"""The generation loop under sanitizers, with a planted race, and compiled for ARM: csrc/ without torch and Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.core import CSRC, compiler

MAIN = Path(__file__).with_name("decode_main.cpp")
SOURCES = ("cpu/sampler.cpp", "decode/linear.cpp", "decode/decoder.cpp", "decode/loop.cpp", "decode/api.cpp")
SANITIZERS = {
    "addresses": ["-fsanitize=address"],
    "undefined behaviour": ["-fsanitize=undefined", "-fno-sanitize-recover=all"],
    "threads": ["-fsanitize=thread"],
}
BUILDS = {"plain": [], "OpenMP": ["-fopenmp"], **SANITIZERS}  # all with -O1: another level rounds sums differently
WITHOUT_ADDRESS_RANDOMISATION = ["setarch", "-R"]  # ThreadSanitizer refuses some kernels' memory layouts

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


def built(folder: Path, flags: list[str], csrc: Path = CSRC, command: str | None = None) -> Path:
    program = folder / "decode"
    sources = [str(csrc / source) for source in SOURCES]
    line = [*(command or str(compiler())).split(), "-std=c++17", "-O1", "-g", "-pthread", *flags, f"-I{csrc}"]
    subprocess.run([*line, "-o", str(program), str(MAIN), *sources], check=True, capture_output=True, text=True)
    return program


def run_program(program: Path, *, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, str(program)]
    if shutil.which("setarch"):
        command = [*WITHOUT_ADDRESS_RANDOMISATION, *command]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TSAN_OPTIONS": "exitcode=66"})


@pytest.mark.slow
def test_same_answers_from_every_build_and_number_of_threads(tmp_path: Path) -> None:
    said = {}
    for name, flags in BUILDS.items():
        (tmp_path / name).mkdir()
        done = run_program(built(tmp_path / name, flags))
        assert done.returncode == 0, f"{name}: {done.stdout[-300:]} {done.stderr[-3000:]}"
        said[name] = done.stdout
    sets, *answers = said["plain"].splitlines()
    assert len(answers) == 8 * int(sets)
    assert len(set(said.values())) == 1, said


@pytest.mark.slow
def test_a_missing_wait_is_found(tmp_path: Path) -> None:
    """Members that do not wait for each other's rows of q, k and v are a race, and ThreadSanitizer says so."""
    shutil.copytree(CSRC, tmp_path / "csrc")
    source = tmp_path / "csrc/decode/decoder.cpp"
    text = source.read_text()
    sound = "qkv.begin, qkv.end);\n        crew.wait();\n"
    assert sound in text
    source.write_text(text.replace(sound, sound.replace("        crew.wait();\n", "")))
    done = run_program(built(tmp_path, SANITIZERS["threads"], tmp_path / "csrc"))
    assert done.returncode == 66, done.stderr[-1000:]
    assert "data race" in done.stderr


@pytest.mark.slow
def test_it_compiles_for_arm_and_runs_there(tmp_path: Path) -> None:
    """The plain vectors become NEON ones; with qemu's user emulation the program runs, too."""
    cross = "aarch64-linux-gnu-g++"
    if shutil.which(cross) is None:
        pytest.skip(f"{cross} (Debian: g++-aarch64-linux-gnu) is not installed")
    program = built(tmp_path, ["-O2", "-static"], command=cross)
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        return
    done = subprocess.run([emulator, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    sets, *answers = done.stdout.splitlines()
    assert sets == "1"
    assert len(answers) == 8
