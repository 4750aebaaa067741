"""A training step's kernels under sanitizers and for ARM: csrc/cpu without torch and Python."""

from __future__ import annotations

import shutil
from pathlib import Path
from subprocess import run

import pytest

from tests.csrc.core import CSRC, compiler
from tests.csrc.test_decode_builds import BUILDS, run_program

MAIN = Path(__file__).with_name("kernels_main.cpp")
SOURCES = ("cpu/embedding.cpp", "cpu/prompt_step.cpp", "cpu/rowwise.cpp", "cpu/tree_attention.cpp")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler"),
]


def built(folder: Path, flags: list[str], csrc: Path = CSRC, command: str | None = None) -> Path:
    program = folder / "kernels"
    line = [*(command or str(compiler())).split(), "-std=c++17", "-O1", "-g", "-pthread", *flags, f"-I{csrc}"]
    sources = [str(csrc / source) for source in SOURCES]
    run([*line, "-o", str(program), str(MAIN), *sources], check=True, capture_output=True, text=True)
    return program


@pytest.mark.parametrize("name", BUILDS)
def test_every_instruction_set_and_number_of_threads_agrees(tmp_path: Path, name: str) -> None:
    done = run_program(built(tmp_path, BUILDS[name]))
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    assert int(done.stdout.split()[0]) >= 1


def test_memory_that_is_too_small_is_found(tmp_path: Path) -> None:
    """A block whose spare rows are forgotten where memory is counted writes behind it."""
    shutil.copytree(CSRC, tmp_path / "csrc")
    source = tmp_path / "csrc/cpu/tree_attention.cpp"
    text = source.read_text()
    sound = "padded_to_panels((rows + kSpareRows) * (wide + 2) + 7 * 16)"
    assert sound in text
    source.write_text(text.replace(sound, "padded_to_panels(rows * (wide + 2))"))
    done = run_program(built(tmp_path, BUILDS["addresses"], tmp_path / "csrc"))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_they_compile_for_arm_and_run_there(tmp_path: Path) -> None:
    cross = "aarch64-linux-gnu-g++"
    if shutil.which(cross) is None:
        pytest.skip(f"{cross} (Debian: g++-aarch64-linux-gnu) is not installed")
    program = built(tmp_path, ["-static"], command=cross)
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("qemu-aarch64 (Debian: qemu-user-static) is not installed; the kernels compile")
    done = run([emulator, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-1000:]
    assert done.stdout.split()[0] == "1"
