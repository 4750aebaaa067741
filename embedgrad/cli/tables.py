"""Tables for the terminal, whose figures stay on one line at 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

Column = tuple[str, Sequence[str]]  # heading, cells
_GAP = 2  # columns of the terminal between two columns of a table
_TITLE = 16  # least width of the first column, which may be broken between words


def tables(columns: Sequence[Column], width: int) -> str:
    """The columns as one table, or as several with the first column repeated, where the figures exceed `width`."""
    titles, *figures = columns
    longest = max(map(len, (titles[0], *titles[1])))
    found = []
    for part in _parts(figures, width - min(_TITLE, longest)):
        room = width - sum(_GAP + _width(column) for column in part)
        found.append(_table([titles, *part], [max(1, min(longest, room)), *map(_width, part)]))
    return "\n\n".join(found)


def _width(column: Column) -> int:
    """The width of a column of figures, whose heading may be broken between words."""
    return max(map(len, (*column[1], *column[0].split())), default=0)


def _parts(figures: Sequence[Column], room: int) -> Iterator[list[Column]]:
    """The columns in parts of at most `room` terminal columns, at least one each."""
    part: list[Column] = []
    for column in figures:
        if part and sum(_GAP + _width(one) for one in (*part, column)) > room:
            yield part
            part = []
        part.append(column)
    yield part


def _table(columns: Sequence[Column], widths: Sequence[int]) -> str:
    rows = [[heading for heading, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]
    lines = []
    for number, row in enumerate(rows):
        wrapped = [textwrap.wrap(cell, max(1, size)) if cell else [] for cell, size in zip(row, widths, strict=True)]
        for pieces in zip_longest(*wrapped, fillvalue="") or [()]:
            padded = (piece.ljust(size) for piece, size in zip(pieces, widths, strict=True))
            lines.append((" " * _GAP).join(padded).rstrip())
        if number == 0:
            lines.append((" " * _GAP).join("─" * size for size in widths))
    return "\n".join(lines)
