"""Data rows in JSON: one object a line, or one array of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from embedgrad.util.errors import DataError

Row = tuple[str, dict[str, Any]]
_SPACE = re.compile(r"[ \t\r\n]*")


class _Twice(ValueError):
    """An object has a field twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(f"has the field {next(name for name in names if names.count(name) > 1)!r} twice")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def line_rows(lines: Iterable[tuple[str, str]], whole: Callable[[], bytes]) -> Iterator[Row]:
    """The object of each line, with the line's place. whole(): the bytes that the lines come from. Raises DataError."""
    for count, (where, line) in enumerate(lines):
        try:
            fields = _DECODER.decode(line)
        except json.JSONDecodeError as error:
            hint = "; one object a line is read, and this is one object on several lines" if not count and (
                line.lstrip().startswith("{") and _is_json(whole())
            ) else ""  # fmt: skip
            raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}{hint}.") from None
        except (RecursionError, ValueError) as error:
            _refuse(where, error)
        yield where, _object(fields, where)


def array_rows(text: str, name: str) -> Iterator[Row]:
    """The objects of one JSON array, each with the line that it begins on. `name` names the file. Raises DataError."""
    at, line, counted = _skip(text, text.index("[") + 1), 1, 0
    more = text[at : at + 1] != "]"
    number = 0
    while more:
        number += 1
        line, counted = line + text.count("\n", counted, at), at
        where = f"{name}, line {line} (item {number} of the array)"
        try:
            fields, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{name}, line {error.lineno} is not JSON: {error.msg} at column {error.colno}, in item {number} of "
                f"the array."
            ) from None
        except (RecursionError, ValueError) as error:
            _refuse(where, error)
        yield where, _object(fields, where)
        at = _skip(text, end)
        sign = text[at : at + 1]
        if sign not in (",", "]"):
            found = f"{sign!r}" if sign else "the end of the file"
            raise DataError(f"{where} is followed by {found}; a comma or the array's end should be there.")
        more = sign == ","
        at = _skip(text, at + 1) if more else at
    rest = text[at + 1 :].strip()
    if rest:
        place = 1 + text.count("\n", 0, _skip(text, at + 1))
        raise DataError(f"{name}, line {place}: more text follows the array; a file holds one array, or objects.")


def json_type(value: Any) -> str:
    """The type of a JSON value, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", float: "a decimal number"}
    return "null" if value is None else names.get(type(value), "a number")


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _is_json(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


def _refuse(where: str, error: RecursionError | ValueError) -> NoReturn:
    if isinstance(error, RecursionError):
        raise DataError(f"{where} is nested too deeply to be an example.") from None
    if isinstance(error, _Twice):
        raise DataError(f"{where} {error}; one of them would be lost.") from None
    raise DataError(f"{where} is not usable JSON: {error}.") from None


def _object(fields: Any, where: str) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise DataError(f"{where} must be a JSON object, not {json_type(fields)}.")
    return fields
