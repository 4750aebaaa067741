"""A lock on a folder, so that two processes never work in it at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from embedgrad.util.errors import ConfigError, SaveError

try:
    import fcntl
except ImportError:  # Windows has no flock, so a second process in the same folder is not detected there
    fcntl = None  # type: ignore[assignment]


class FolderInUse(ConfigError):
    """Another process works in the folder."""


def lock(path: Path) -> BinaryIO:
    """Locks an existing folder until the file that is returned is closed, or the process ends.

    Raises FolderInUse where another process has it, and SaveError where it cannot be locked.
    """
    try:
        held = open(path / ".lock", "ab")  # noqa: SIM115 (held open as long as the folder is in use)
    except OSError as error:
        raise SaveError(f"cannot write to the run folder {path}: {error.strerror or error}.") from error
    try:
        if fcntl is not None:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held.close()
        if isinstance(error, BlockingIOError):
            raise FolderInUse(f"another process is working in {path}; wait for it or choose another name.") from error
        raise SaveError(f"cannot lock {path}: {error.strerror or error}.") from error
    return held


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes the folder where there is none, and locks it inside the block. Raises what `lock` raises."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"cannot make the folder {path}: {error.strerror or error}.") from error
    with lock(path):
        yield
