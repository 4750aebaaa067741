"""Data rows in tables with a header line, as spreadsheets and pandas write them (.csv, .tsv)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from embedgrad.util.errors import DataError

SEPARATORS = {".csv": ",;\t", ".tsv": "\t"}
"""The separators that a file may have, by its suffix; the header says which one it is."""
_LONGEST = 1 << 30  # characters of a field; the csv module's own limit, 131,072, is shorter than some documents


def table_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE, line N", fields by the header's names) for each row that is not blank.

    Every field is text. A column without a name, such as the index that pandas writes, is left out. Raises DataError.
    """
    suffix = name[name.rfind(".") :].lower()
    separator = max(SEPARATORS[suffix], key=_header(text).count)
    limit = csv.field_size_limit(_LONGEST)
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        header: list[str] | None = None
        line = 0
        while True:
            start, values = line + 1, next(rows, None)
            line = rows.line_num
            if values is None:
                return
            if not any(value.strip() for value in values):
                continue
            where = f"{name}, line {start}"
            if header is None:
                header = _names(values, where)
            elif len(values) != len(header):
                raise DataError(f"{where} has {len(values)} fields; the header has {len(header)}.")
            else:
                yield where, {name: value for name, value in zip(header, values, strict=True) if name}
    except csv.Error as error:
        raise DataError(f"{name}, line {line + 1} is not a row of a table: {error}.") from None
    finally:
        csv.field_size_limit(limit)


def _header(text: str) -> str:
    """The first line that is not blank, without what is quoted."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return "".join(line.split('"')[::2])


def _names(values: list[str], where: str) -> list[str]:
    names = [value.strip() for value in values]
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise DataError(f"{where}, the header, has the name {twice[0]!r} twice; one of the columns would be lost.")
    return names
