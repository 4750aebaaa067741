"""A table of a report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table whose cells are text. texts: indices of the columns that hold texts; all others are aligned right."""

    header: list[str]
    rows: list[list[str]]
    note: str = ""
    texts: tuple[int, ...] = (0,)
