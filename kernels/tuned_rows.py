"""The rows of the launch table that `python -m bench tune` measured: tuned_rows.json, read before the written rows.

A file of data, because a program writes it: no code is made or run, a row is one line, and so a new measurement is one
changed line. A row holds for the range of sizes that it was measured for and leaves the others to the written rows.
"""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .launch_row import Row, Tuned

FILE = Path(__file__).with_name("tuned_rows.json")
_LIMITS = ("bytes", "at_least", "at_most", "options")
_MEASURED = ("triton", "device", "date", "microseconds", "before")
_FIELDS = {"kernel", "arch", *_LIMITS, *_MEASURED}


def parse(text: str) -> tuple[Row, ...]:
    """The rows of a file's text. Raises ValueError with a sentence that names the row at fault."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(found, list):
        raise ValueError(f"it holds a {type(found).__name__} instead of a list of rows")
    return tuple(_row(number, one) for number, one in enumerate(found, 1))


def _row(number: int, one: Any) -> Row:
    if not isinstance(one, dict) or one.keys() != _FIELDS:
        raise ValueError(f"row {number} does not have exactly the fields {', '.join(sorted(_FIELDS))}")
    for name in ("kernel", "arch", "triton", "device", "date"):
        if not isinstance(one[name], str) or not one[name]:
            raise ValueError(f"row {number} has {one[name]!r} as {name}; it must be text")
    for name in ("at_least", "at_most", "options", "microseconds", "before"):
        kinds = (int,) if name in _LIMITS else (int, float)
        values = one[name].values() if isinstance(one[name], dict) else [-1]
        if not all(type(value) in kinds and value >= 0 for value in values):
            raise ValueError(f"row {number} has {one[name]!r} as {name}; it must give numbers by name")
    if not isinstance(one["bytes"], list) or not all(type(size) is int for size in one["bytes"]):
        raise ValueError(f"row {number} has {one['bytes']!r} as bytes; it must be a list of element sizes")
    if not {"num_warps", "num_stages"} <= one["options"].keys() or not all(one["options"].values()):
        raise ValueError(f"row {number} has the options {one['options']}; num_warps, num_stages and no 0 are needed")
    tuned = Tuned(**{name: one[name] for name in _MEASURED})
    return Row(
        one["kernel"], one["arch"], one["options"], reason(tuned),
        bytes=tuple(one["bytes"]), at_most=one["at_most"], at_least=one["at_least"], tuned=tuned,
    )  # fmt: skip


def reason(tuned: Tuned) -> str:
    """The reason of a measured row, in words."""
    times = ", ".join(
        f"{us:.1f} us at {shape}" + (f" (before: {tuned.before[shape]:.1f})" if shape in tuned.before else "")
        for shape, us in tuned.microseconds.items()
    )
    return f"tuned: {times}; {tuned.device}, Triton {tuned.triton}, {tuned.date}"


def text_of(rows: Iterable[Row]) -> str:
    """The file's text for rows that were tuned: one a line, in the order of their keys."""
    lines = []
    for row in sorted(rows, key=key):
        assert row.tuned is not None
        one = {
            "kernel": row.kernel, "arch": row.arch, "bytes": list(row.bytes), "at_least": row.at_least,
            "at_most": row.at_most, "options": row.options, **vars(row.tuned),
        }  # fmt: skip
        lines.append(json.dumps(one))
    return "[\n" + ",\n".join(lines) + ("\n" if lines else "") + "]\n"


def key(row: Row) -> tuple[Any, ...]:
    """What a row is for: two rows with one key would compete."""
    return (row.kernel, row.arch, row.bytes, tuple(sorted(row.at_least.items())), tuple(sorted(row.at_most.items())))


def merged(old: Iterable[Row], new: Iterable[Row]) -> tuple[Row, ...]:
    """The old rows with each new one in the place of the old one with its key, in the order of the file."""
    by_key = {key(row): row for row in (*old, *new)}
    return tuple(sorted(by_key.values(), key=key))


def read(path: Path = FILE) -> tuple[Row, ...]:
    """The rows of a file; none, and a warning that says why, where it cannot be used."""
    try:
        return parse(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        warnings.warn(f"the tuned launch rows of {path} are not used: {why}.", RuntimeWarning, stacklevel=2)
        return ()
