"""Tables and pictures of the documents, made from the recorded rows alone.

A document holds places `<!-- bench: NAME -->` … `<!-- end of NAME -->`. What stands between the two is replaced by the
table NAME. Pictures are SVG files in bench/pictures/.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from bench.harness import rows
from bench.harness.rows import ROOT, Row
from embedgrad.util.files import write_atomic

DOCUMENTS = tuple(
    ROOT / name for name in ("bench/README.md", "docs/deploy.md", "docs/kernels.md", "docs/performance.md")
)
PICTURES = ROOT / "bench/pictures"
PLACE = re.compile(r"<!-- bench: (?P<name>[\w.-]+) -->\n.*?<!-- end of (?P=name) -->", re.DOTALL)


class Question(Protocol):
    """A module `bench/NAME.py`; the first line of its docstring is the question."""

    __name__: str
    CHECKS: Sequence[str]
    """Tests (pytest ids) that must pass before anything is timed."""

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """Its own options."""

    def main(self, args: argparse.Namespace, /) -> list[Row]:
        """Measure or count; the rows."""

    def tables(self, rows: Sequence[Row], /) -> dict[str, str]:
        """Markdown by the tables' names, from the rows of one run."""

    def pictures(self, rows: Sequence[Row], /) -> dict[str, Any]:
        """matplotlib figures by the pictures' names, from the rows of one run."""


def outdated(questions: Sequence[Question]) -> list[Path]:
    """The documents that do not hold the tables of these questions as they are now."""
    return [path for path, text in _documents(questions) if text != path.read_text()]


def rebuild(questions: Sequence[Question]) -> None:
    """Make the tables and pictures of these questions anew."""
    for path, text in _documents(questions):
        if text != path.read_text():
            write_atomic(path, text.encode())
            print(f"made anew: {path.relative_to(ROOT)}")
    for question in questions:
        _draw(question)


def tables_of(question: Question) -> dict[str, str]:
    """The tables of a question's recorded rows, by name; below each, where the rows come from.

    A question that measures CPUs and GPUs has those of the last run on a GPU as well, as NAME-cuda. One with a HISTORY
    says itself where its rows come from.
    """
    name, found = _name(question), recorded(question)
    if getattr(question, "HISTORY", False):
        return question.tables(found) if found else {}
    measured = {"": found} if found else {}
    measured |= {end: rows.newest(name, card=card) for end, card in zip(("-cuda",), rows.cards(name), strict=False)}
    return {
        f"{key}{end}": f"{text.strip()}\n\n{_source(own)}"
        for end, own in measured.items()
        for key, text in question.tables(own).items()
    }


def recorded(question: Question) -> list[Row]:
    """The rows that count of a question: those of its last run on a CPU, or of all runs if it has a HISTORY."""
    name = _name(question)
    if getattr(question, "HISTORY", False):
        return [one for found in rows.runs(name) for one in found]
    return rows.newest(name)


def _name(question: Question) -> str:
    return question.__name__.rpartition(".")[2]


def filled(text: str, tables: dict[str, str]) -> str:
    """`text` with its places filled; a place whose table does not exist stays as it is."""

    def put(place: re.Match[str]) -> str:
        name = place["name"]
        if name not in tables:
            return place[0]
        return f"<!-- bench: {name} -->\n{tables[name].strip()}\n<!-- end of {name} -->"

    return PLACE.sub(put, text)


def _documents(questions: Sequence[Question]) -> list[tuple[Path, str]]:
    """The documents and what they should say."""
    tables: dict[str, str] = {}
    for question in questions:
        tables |= tables_of(question)
    return [(path, filled(path.read_text(), tables)) for path in DOCUMENTS if path.exists()]


def _source(found: list[Row]) -> str:
    runs = {one.run.model_dump_json(): one.run for one in found if one.run is not None}
    told = (f"`{run.command}`, {run.started[:10]}, commit {run.commit}, {run.machine}" for run in runs.values())
    return f"<sub>{'; '.join(told)}</sub>"


def _draw(question: Question) -> None:
    found = recorded(question)
    if not found:
        return
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed, so the pictures stay as they are.")
        return
    from bench.harness import pictures

    with pictures.style():
        for name, figure in question.pictures(found).items():
            pictures.save(figure, PICTURES / f"{name}.svg")
            plt.close(figure)
            print(f"made anew: bench/pictures/{name}.svg")
