"""What became of a run's prompt elsewhere: its texts (`embedgrad distil`) and other models (`embedgrad transfer`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedgrad.distil import result as distilled
from embedgrad.report.table import Table
from embedgrad.transfer import result as transferred

_LONGEST = 300  # characters of a text in the table
_ERRORS = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, StopIteration, RecursionError)


def elsewhere(folder: Path) -> tuple[dict[str, Table], list[str]]:
    """(tables by heading, a sentence for each file that cannot be read) of the run in `folder`."""
    tables: dict[str, Table] = {}
    missing: list[str] = []
    kinds: list[tuple[str, Callable[[Any], tuple[str, Table]]]] = [
        (f"distil/{distilled.FILE}", _texts), (f"transfer-*/{transferred.FILE}", _models),
    ]  # fmt: skip
    for pattern, make in kinds:
        for path in sorted(folder.glob(pattern)):
            try:
                heading, table = make(json.loads(path.read_text("utf-8")))
                tables[heading] = table
            except _ERRORS:
                missing.append(f"{path.relative_to(folder)} is damaged and was left out.")
    return tables, missing


def _texts(found: Any) -> tuple[str, Table]:
    texts = ["–", *(_cut(one["text"]) for one in distilled.listed(found))]
    rows = [[row[0], text, *row[1:]] for row, text in zip(distilled.rows(found), texts, strict=True)]
    head, *others = distilled.header(found)
    note = " ".join([distilled.paragraph(found), *found["warnings"]])
    return "The prompt as text", Table([head, "text", *others], rows, note, (0, 1))


def _models(found: Any) -> tuple[str, Table]:
    note = " ".join([transferred.paragraph(found), *found["warnings"]])
    return f"The prompt on {found['target']}", Table(transferred.header(found), transferred.rows(found), note)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
