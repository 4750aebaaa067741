"""Who includes whom in csrc/: arrows point down, files form no circle, and only torch_ops.cpp knows torch."""

from __future__ import annotations

import re
from pathlib import Path

from tests.csrc.core import CSRC

FILES = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".inl", ".cpp", ".cu", ".cuh")]
BELOW = {  # what a folder may include besides itself; "." is torch_ops.cpp
    "common": set(),
    "cpu": {"common"},
    "decode": {"common", "cpu"},
    "cuda": {"common"},
    ".": {"common", "cpu", "decode"},
}


def room(file: Path) -> str:
    folder = file.relative_to(CSRC).parts[:-1]
    return folder[0] if folder else "."


def included(file: Path) -> list[Path]:
    """Our own files that `file` includes. A kernel file (EMBEDGRAD_KERNELS) counts for the source that names it."""
    text = file.read_text()
    names = re.findall(r'^#include "(.+)"', text, re.MULTILINE)
    found = [(file.parent / name).resolve() for name in names]
    kernels = re.findall(r'^#define EMBEDGRAD_KERNELS "(.+)"', text, re.MULTILINE)
    return found + [(CSRC / "cpu" / name).resolve() for name in kernels]


def test_includes_point_down() -> None:
    for file in FILES:
        for other in included(file):
            assert other.is_file(), f"{file}: {other}"
            assert room(other) == room(file) or room(other) in BELOW[room(file)], f"{file} includes {other}"


def test_files_form_no_circle() -> None:
    done: set[Path] = set()

    def visit(file: Path, path: tuple[Path, ...]) -> None:
        assert file not in path, " -> ".join(str(p.relative_to(CSRC)) for p in (*path, file))
        if file not in done:
            for other in included(file):
                visit(other, (*path, file))
            done.add(file)

    for file in FILES:
        visit(file.resolve(), ())


def test_only_the_registration_knows_torch() -> None:
    for file in FILES:
        torch = re.findall(r"^#include <(ATen|torch|c10)/", file.read_text(), re.MULTILINE)
        assert not torch or file.relative_to(CSRC).as_posix() == "torch_ops.cpp", file
