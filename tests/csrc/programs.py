"""Programs of csrc/ without torch and Python: built in several ways, with a planted fault, and for ARM."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.csrc.core import CSRC, compiler

SANITIZERS = {
    "addresses": ["-fsanitize=address"],
    "undefined behaviour": ["-fsanitize=undefined", "-fno-sanitize-recover=all"],
    "threads": ["-fsanitize=thread"],
}
BUILDS = {"plain": [], "OpenMP": ["-fopenmp"], **SANITIZERS}  # all with -O1: another level rounds sums differently
WITHOUT_ADDRESS_RANDOMISATION = ["setarch", "-R"]  # ThreadSanitizer refuses some kernels' memory layouts


@dataclass(frozen=True)
class Program:
    """A main file of this folder and the sources of csrc/ that it needs."""

    main: str
    sources: Sequence[str]

    def built(self, folder: Path, flags: Sequence[str], csrc: Path = CSRC, command: str | None = None) -> Path:
        """The program in `folder`; raises CalledProcessError with the compiler's words."""
        program = folder / Path(self.main).stem
        line = [*(command or str(compiler())).split(), "-std=c++17", "-O1", "-g", "-pthread", *flags, f"-I{csrc}"]
        sources = [str(Path(__file__).with_name(self.main)), *(str(csrc / source) for source in self.sources)]
        subprocess.run([*line, "-o", str(program), *sources], check=True, capture_output=True, text=True)
        return program

    def on_arm(self, folder: Path, flags: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
        """What it says under qemu's user emulation, None where that is missing; skips without a cross compiler."""
        cross = "aarch64-linux-gnu-g++"
        if shutil.which(cross) is None:
            pytest.skip(f"{cross} (Debian: g++-aarch64-linux-gnu) is not installed")
        program = self.built(folder, ["-static", *flags], command=cross)
        emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
        return None if emulator is None else run([emulator, str(program)])


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A program's end, whatever it was."""
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TSAN_OPTIONS": "exitcode=66"})


def run_program(program: Path) -> subprocess.CompletedProcess[str]:
    """The same for one that may be built with ThreadSanitizer."""
    return run([*(WITHOUT_ADDRESS_RANDOMISATION if shutil.which("setarch") else ()), str(program)])


def planted(folder: Path, file: str, sound: str, faulty: str) -> Path:
    """A copy of csrc/ in `folder` in whose `file` the text `sound` reads `faulty`."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    source = csrc / file
    text = source.read_text()
    assert sound in text
    source.write_text(text.replace(sound, faulty))
    return csrc
