"""Tables and pictures of the documents, made from the committed rows and from nothing else.

A document holds places `<!-- bench: NAME -->` … `<!-- end of NAME -->`; what stands between is replaced by the table of
that name. Pictures are SVG files in bench/pictures/.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from bench import rows
from bench.__main__ import ALL
from embedgrad.files import write_atomic

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "bench/README.md", ROOT / "docs/kernels.md")
PICTURES = ROOT / "bench/pictures"
QUESTIONS = [name for name, *_ in ALL]
PLACE = re.compile(r"<!-- bench: (?P<name>[\w.-]+) -->\n.*?<!-- end of (?P=name) -->", re.DOTALL)


def main(args: argparse.Namespace) -> int:
    """`python -m bench report`; with --check the exit status says whether all is up to date."""
    if args.check:
        old = [str(path.relative_to(ROOT)) for path, text in _documents(QUESTIONS) if text != path.read_text()]
        print("\n".join(f"{name} is out of date: run `python -m bench report`." for name in old) or "up to date")
        return 1 if old else 0
    rebuild(QUESTIONS)
    return 0


def rebuild(questions: Iterable[str]) -> None:
    """Make the tables and pictures of these questions anew."""
    questions = list(questions)
    for path, text in _documents(questions):
        if text != path.read_text():
            write_atomic(path, text.encode())
            print(f"made anew: {path.relative_to(ROOT)}")
    for name in questions:
        found = rows.newest(name)
        if found:
            _draw(importlib.import_module(f"bench.{name}"), found)


def tables_of(question: str) -> dict[str, str]:
    """The tables of a question's committed rows, by name."""
    found = rows.newest(question)
    return _tables(importlib.import_module(f"bench.{question}"), found) if found else {}


def _documents(questions: Iterable[str]) -> list[tuple[Path, str]]:
    """The documents and what they should say."""
    tables: dict[str, str] = {}
    for name in questions:
        tables |= tables_of(name)
    return [(path, filled(path.read_text(), tables)) for path in DOCUMENTS if path.exists()]


def filled(text: str, tables: dict[str, str]) -> str:
    """`text` with its places filled; a place whose table is not there stays as it is."""

    def put(place: re.Match[str]) -> str:
        name = place["name"]
        if name not in tables:
            return place[0]
        return f"<!-- bench: {name} -->\n{tables[name].strip()}\n<!-- end of {name} -->"

    return PLACE.sub(put, text)


def _tables(module: ModuleType, found: list[rows.Row]) -> dict[str, str]:
    return {name: f"{text.strip()}\n\n{source(found)}" for name, text in module.tables(found).items()}


def source(found: list[rows.Row]) -> str:
    """Where rows come from, in a line."""
    run = found[0].run
    assert run is not None
    return f"<sub>`{run.command}`, {run.started[:10]}, commit {run.commit}, {run.machine}</sub>"


def _draw(module: ModuleType, found: list[rows.Row]) -> None:
    import matplotlib.pyplot as plt

    from bench import style

    with style.used():
        for name, figure in module.pictures(found).items():
            style.save(figure, PICTURES / f"{name}.svg")
            plt.close(figure)
            print(f"made anew: bench/pictures/{name}.svg")
