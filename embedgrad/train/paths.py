"""Relative paths of a configuration file count from its folder, those of the command line from the current one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedgrad.util.errors import ConfigError

# Keys of the configuration that hold paths; a section that is a text is the text of its first key.
_OUTPUT = "run.folder"
_PATHS = (
    ("model", "path"), ("prompt", "file"), ("data", "path"), ("data", "folder"), ("data", "train", "path"),
    ("data", "validation", "path"), ("data", "test", "path"), ("run", "folder"),
)  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:[@:][\w./-]+)?")


def expand_path(path: str) -> Path:
    """`path` with ~ and $VARIABLES replaced. A relative path starts at the current folder."""
    return Path(os.path.expandvars(os.path.expanduser(path)))


def count_from(folder: Path, values: dict[Any, Any]) -> None:
    """Puts `folder`, from which they count, before the relative paths in the `values` of a configuration.

    A model that is not there is left as it is where it may be a hub id. Values of other types are left for the check of
    the configuration. Raises ConfigError where a file is missing there and is in the current folder instead.
    """
    _each(values, lambda given, key: _placed(given, folder, key))


def seen_from(folder: Path, values: dict[Any, Any]) -> None:
    """Makes relative paths in `values`, which count from the current folder, count from `folder`: for a file there."""
    _each(values, lambda given, key: _moved(given, folder))


def _each(values: dict[Any, Any], change: Callable[[str, str], str]) -> None:
    """Replaces every path by change(path, its key)."""
    for key in _PATHS:
        section: Any = values
        for name in key[:-1]:
            inner = section.get(name) if isinstance(section, dict) else None
            if isinstance(inner, str) and name in ("model", "train", "validation", "test"):
                inner = section[name] = {"path": inner}
            section = inner
        if isinstance(section, dict) and isinstance(section.get(key[-1]), str):
            section[key[-1]] = change(section[key[-1]], ".".join(key))


def _placed(given: str, folder: Path, key: str) -> str:
    path = expand_path(given)
    if path.is_absolute() or not given.strip():
        return given
    found = Path(os.path.normpath(folder / path))
    try:
        missing = key != _OUTPUT and not found.exists()
        elsewhere = missing and path.exists()
    except (OSError, ValueError):  # a name that is no path, which the reader refuses
        return given
    if elsewhere:
        raise ConfigError(
            f"{key} is {given!r}, but there is no {found}: relative paths in a configuration count from its folder; "
            f"from there {path.absolute()} is {os.path.relpath(path, folder)!r}."
        )
    return given if missing and key == "model.path" and _HUB_ID.fullmatch(given) else str(found)


def _moved(given: str, folder: Path) -> str:
    path = expand_path(given)
    try:
        here = not path.is_absolute() and (path.exists() or not _HUB_ID.fullmatch(given))
    except (OSError, ValueError):
        return given
    return os.path.relpath(path, folder) if here else given
