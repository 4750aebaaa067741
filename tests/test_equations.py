"""The table of docs/design.md that leads from each equation to the line that computes it."""

from __future__ import annotations

import ast
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\(\d+\).*?) \| (.*) \|$", DESIGN, re.MULTILINE)
HOPS = (1, 2, 3, 4)  # naive, reference, triton, native
LINK = re.compile(r"\[([^\]]*)\]\(\.\./([^)]*)\)")

Link = tuple[Path, list[str]]  # a file, and the names that the table finds in it


def links(cell: str) -> list[Link]:
    """The links of a cell in the order of the calls."""
    return [(ROOT / path, re.findall(r"`([\w.]+)`", label)) for label, path in LINK.findall(cell)]


@cache
def definitions(path: Path) -> dict[str, str]:
    """Function, class and Class.method -> source."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":  # C++: a name that an opening bracket follows; the whole file stands for its source
        return dict.fromkeys(re.findall(r"\b(\w+)\s*\(", text), text)
    found: dict[str, str] = {}
    lines = text.splitlines()
    for node in ast.parse(text).body:
        for each in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            if isinstance(each, (ast.FunctionDef, ast.ClassDef)):
                source = "\n".join(lines[each.lineno - 1 : each.end_lineno])
                found[each.name if each is node else f"{node.name}.{each.name}"] = source
                found.setdefault(each.name, source)
    return found


def test_every_equation_has_its_rows() -> None:
    forward = re.findall(r"^ +\((\d+)\)", DESIGN, re.MULTILINE)
    assert {number for label, _ in ROWS for number in re.findall(r"\((\d+)\)", label)} == set(forward)


@pytest.mark.parametrize(("label", "cells"), ROWS, ids=[label for label, _ in ROWS])
def test_the_links_lead_to_the_line(label: str, cells: str) -> None:
    """Each file has the names, each calls the next, the engine's comment has the number, the hops are few enough."""
    engine, *backends = [[links(chain) for chain in re.split(r"(?<=\)); ", cell)] for cell in cells.split(" | ")]
    for chain in (chain for cell in (engine, *backends) for chain in cell):
        for path, names in chain:
            missing = [name for name in names if name not in definitions(path)]
            assert not missing, f"{path} has no {missing}"
        for (path, names), (_, called) in pairwise(chain):
            source = " ".join(definitions(path)[name] for name in names)
            assert any(name.rpartition(".")[2] in source for name in called), f"{path} calls none of {called}"
    path, names = engine[0][0]
    for number in re.findall(r"\(\d+\)", label):
        assert any(number in definitions(path)[name] for name in names), f"{path} has no comment {number}"
    for most, cell in zip(HOPS, backends, strict=True):
        assert all(len(chain) <= most for chain in cell), cell
