"""Reads examples and queries from JSON lines, JSON arrays and tables (.csv, .tsv).

Every example knows its place, "FILE, line N", so that what is found wrong with it later can be found in the file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from embedgrad.data.example import Example
from embedgrad.data.json_rows import array_rows, json_type, line_rows
from embedgrad.data.tables import SEPARATORS, table_rows
from embedgrad.util.errors import DataError
from embedgrad.util.shown import short
from embedgrad.util.text import NotUtf8, decoded, numbered_lines

Row = tuple[str, dict[str, Any]]
_JSON = (".jsonl", ".json", ".ndjson")
_OTHER_KINDS = {
    b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"PK\x03\x04": "a spreadsheet or a zip archive",
    b"\x1f\x8b": "compressed by gzip", b"SQLite format 3": "an SQLite database",
}  # fmt: skip
_MARK = b"\xef\xbb\xbf"  # UTF-8's byte-order mark
_PEEKED = 4096  # bytes in which the first sign of a file is looked for


def read_jsonl(
    path: str | os.PathLike[str], query: str = "query", target: str = "target", limit: int | None = None
) -> list[Example]:
    """The examples of a UTF-8 file of JSON lines, of one JSON array of objects, or of a .csv or .tsv table.

    query, target: names of the fields. A field holds non-empty text or a whole number, which becomes its digits.
    limit: read at most this many examples; None reads all.
    Raises DataError with the name of the file and, where one line is wrong, its number.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the limit on the examples of {path} must be at least 1, not {limit}.")
    examples = [
        Example(text_field(fields, query, where), text_field(fields, target, where), where=where)
        for where, fields in islice(read_rows(path), limit)
    ]
    if not examples:
        raise DataError(f"{path} is empty: it needs one JSON object a line.")
    return examples


def read_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """("FILE, line N", fields by name) for each data row. Iteration raises DataError."""
    path = Path(path)
    with _opened(path) as file:
        start = file.peek(_PEEKED)[:_PEEKED]  # type: ignore[attr-defined]  # a BufferedReader has it
        for magic, what in _OTHER_KINDS.items():
            if start.startswith(magic):
                raise DataError(f"{path} is {what}; save it as JSON lines, as one JSON array of objects, or as .csv.")
        if path.suffix.lower() in SEPARATORS:
            yield from table_rows(_text(file, path), str(path))
        elif start.removeprefix(_MARK).lstrip().startswith(b"["):
            yield from array_rows(_text(file, path), str(path))
        else:
            yield from line_rows(numbered_lines(file, str(path), DataError), lambda: path.read_bytes())


def read_queries(path: str | os.PathLike[str], query: str = "query") -> list[str]:
    """The queries of a UTF-8 file: the field `query` of its data rows (.jsonl, .json, .ndjson, .csv, .tsv), else one
    query per line.

    Only line feeds end a line. Other separators (U+2028, form feed) may be part of a query. Blank lines are skipped.
    Raises DataError as `read_jsonl` does, except that a file may hold no query.
    """
    path = Path(path)
    if path.suffix.lower() in (*_JSON, *SEPARATORS):
        return [text_field(fields, query, where) for where, fields in read_rows(path)]
    with _opened(path) as file:
        return query_lines(file, str(path))


def query_lines(lines: Iterable[bytes], name: str) -> list[str]:
    """One query per line that is not blank. `name` names where they come from. Raises DataError."""
    return [line for _, line in numbered_lines(lines, name, DataError)]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"there is no data file {path}.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"the data file {path} cannot be read: {reason}.") from error


def _text(file: BinaryIO, path: Path) -> str:
    try:
        return decoded(file.read(), unit="file")
    except NotUtf8 as wrong:
        raise DataError(f"{path} {wrong}.") from None


def text_field(fields: Mapping[str, Any], name: str, where: str) -> str:
    """The text in the field `name` of one data row; a whole number becomes its digits.

    where: names the data row in messages. Raises DataError where the field is missing, empty, or of another type.
    """
    if name not in fields:
        known = ", ".join(short(key, 60) for key in list(fields)[:8]) or "none"
        raise DataError(f"{where} has no field {short(name)}; its fields are: {known}.")
    value = fields[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        told = json_type(value) + ("" if value is None else f" ({short(value)})")
        raise DataError(f"{where}: the field {name!r} must be text or a whole number, not {told}.")
    if not value.strip():
        raise DataError(f"{where}: the field {name!r} is empty.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: the field {name!r} has half of a surrogate pair, which is not text.") from None
    return value
