"""Reads examples and queries from JSON-lines files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embedgrad.data.example import Example
from embedgrad.util.errors import DataError
from embedgrad.util.shown import short


def read_jsonl(
    path: str | os.PathLike[str], query: str = "query", target: str = "target", limit: int | None = None
) -> list[Example]:
    """The examples of a UTF-8 file with one JSON object per line; blank lines are skipped.

    query, target: names of the fields. A field holds non-empty text or a whole number, which becomes its digits.
    limit: read at most this many examples; None reads all.
    Raises DataError with the name of the file and, where one line is wrong, its number.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the limit on the examples of {path} must be at least 1, not {limit}.")
    examples: list[Example] = []
    for where, fields in read_rows(path):
        examples.append(Example(query=text_field(fields, query, where), target=text_field(fields, target, where)))
        if len(examples) == limit:
            break
    if not examples:
        raise DataError(f"{path} is empty: it needs one JSON object a line.")
    return examples


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE, line N", JSON object) for each line that is not blank. Iteration raises DataError."""
    for where, line in _lines(Path(path)):
        yield where, _object(line, where)


def read_queries(path: str | os.PathLike[str], query: str = "query") -> list[str]:
    """The queries of a UTF-8 file: the field `query` of JSON lines (.jsonl, .json, .ndjson), else one query per line.

    Only line feeds end a line. Other separators (U+2028, form feed) may be part of a query. Blank lines are skipped.
    Raises DataError as `read_jsonl` does, except that a file may hold no query.
    """
    lines = _lines(Path(path))
    if Path(path).suffix not in (".jsonl", ".json", ".ndjson"):
        return [line for _, line in lines]
    return [text_field(_object(line, where), query, where) for where, line in lines]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """("FILE, line N", text) for each line that is not blank."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{where} is not UTF-8 (byte {error.start + 1} of the line).") from None
                if text.strip():
                    yield where, text.rstrip("\r\n")
    except FileNotFoundError:
        raise DataError(f"there is no data file {path}.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"the data file {path} cannot be read: {reason}.") from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except RecursionError:
        raise DataError(f"{where} is nested too deeply to be an example.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from None
    except ValueError as error:
        raise DataError(f"{where} is not usable JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where} must be a JSON object, not {_json_type(fields)}.")
    return fields


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
        raise DataError(f"{where}: the field {name!r} must be text or a whole number, not {_json_type(value)}.")
    if not value.strip():
        raise DataError(f"{where}: the field {name!r} is empty.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: the field {name!r} has half of a surrogate pair, which is not text.") from None
    return value


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", float: "a decimal number"}
    return "null" if value is None else names.get(type(value), "a number")
