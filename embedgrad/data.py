"""Examples from JSON-lines files, and their division into parts that share no query."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedgrad.errors import DataError
from embedgrad.example import Example


def read_jsonl(
    path: str | os.PathLike[str], query: str = "query", target: str = "target", limit: int | None = None
) -> list[Example]:
    """The examples of a UTF-8 file with one JSON object a line; empty lines are skipped.

    query, target: names of the fields, which hold text that is not empty; a whole number is taken as its digits.
    limit: read at most so many examples (None: all).
    Raises DataError that names the file and, where it applies, the line.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the limit on the examples of {path} must be at least 1, not {limit}.")
    examples: list[Example] = []
    for where, line in _lines(Path(path)):
        fields = _object(line, where)
        examples.append(Example(query=_text(fields, query, where), target=_text(fields, target, where)))
        if len(examples) == limit:
            break
    if not examples:
        raise DataError(f"{path} is empty: it needs one JSON object a line.")
    return examples


def read_queries(path: str | os.PathLike[str], query: str = "query") -> list[str]:
    """The queries of a UTF-8 file: the field `query` of JSON lines (.jsonl, .json, .ndjson), else one a line.

    Lines end at line feeds only: other separators (U+2028, form feed) may stand inside a query. Empty lines are
    skipped. Raises DataError as `read_jsonl` does, but for a file without any query.
    """
    lines = _lines(Path(path))
    if Path(path).suffix not in (".jsonl", ".json", ".ndjson"):
        return [line for _, line in lines]
    return [_text(_object(line, where), query, where) for where, line in lines]


def split(examples: Sequence[Example], sizes: Mapping[str, int | float], seed: int = 0) -> dict[str, list[Example]]:
    """Divides `examples` into named parts; each part comes in an order drawn by `seed`.

    sizes: for each part the number of its examples (int), or its fraction of all of them (float, rounded down). Where
        fractions add up to 1, every example comes to some part.
    Queries that are equal but for white space always come to the same part, so a part may be a few examples short of
    its size. Where a query goes depends on seed, sizes and the queries there are, not on the order of the examples.
    Raises DataError where the examples do not suffice or the sizes make no sense.
    """
    wanted, all_of_them = _counts(len(examples), sizes)
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(_key(example.query), []).append(example)
    left = [groups[key] for key in sorted(groups, key=lambda key: _rank(seed, key))]
    parts: dict[str, list[Example]] = {}
    for name, count in wanted.items():
        part: list[Example] = []
        rest = []
        for group in left:
            if len(part) + len(group) <= count:
                part.extend(group)
            else:
                rest.append(group)
        if count and not part:
            raise DataError(f"the part {name!r} of {count} examples stays empty: equal queries come in larger groups.")
        parts[name], left = part, rest
    if all_of_them:
        largest = max(wanted, key=lambda name: wanted[name])
        parts[largest].extend(example for group in left for example in group)
    return parts


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """("FILE, line N", text) of each line that is not blank."""
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


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    if name not in fields:
        known = ", ".join(repr(key) for key in list(fields)[:8]) or "none"
        raise DataError(f"{where} has no field {name!r}; its fields are: {known}.")
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


def _counts(total: int, sizes: Mapping[str, int | float]) -> tuple[dict[str, int], bool]:
    """(examples of each part, whether the parts are to share out all of them)."""
    counts: dict[str, int] = {}
    fractions = 0.0
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 <= size < math.inf:
            raise DataError(f"the size of the part {name!r} must be a number of examples or a fraction, not {size!r}.")
        if isinstance(size, float):
            if size > 1:
                raise DataError(f"the fraction of the part {name!r} must lie between 0 and 1, not {size}.")
            fractions += size
            counts[name] = math.floor(size * total + 1e-9)
        else:
            counts[name] = size
    everything = math.isclose(fractions, 1.0) and all(isinstance(size, float) for size in sizes.values())
    if not counts:
        raise DataError("a split needs at least one part.")
    if fractions > 1 + 1e-9 or sum(counts.values()) > total:
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(f"a split into {asked} needs more than the {total} examples there are.")
    return counts, everything


def _key(query: str | Sequence[int]) -> str:
    """What makes two queries the same one."""
    if isinstance(query, str):
        return "text:" + " ".join(query.split())
    return "ids:" + ",".join(str(int(token)) for token in query)


def _rank(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).digest()
