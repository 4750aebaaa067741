"""Atomic writing of files: a file is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from embedgrad.util.errors import SaveError


def write_atomic(path: str | os.PathLike[str], data: bytes | Callable[[BinaryIO], object]) -> None:
    """Write `data` (bytes, or a function that writes to the open file) to `path`.

    The steps are: temporary file in the same folder, flush, fsync, rename, fsync of the folder. After a crash at any
    moment `path` holds either all of the old bytes or all of the new ones. Raises SaveError; the old file is then
    unchanged. A symbolic link stays, and the file that it leads to is written; a file's permissions stay as well.
    """
    path = behind_links(path)
    temporary = None
    check_target(path)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
            temporary = file.name
            if callable(data):
                data(cast(BinaryIO, file))
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise SaveError(f"cannot write {path}: {reason}; free some space or choose another folder.") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def behind_links(path: str | os.PathLike[str]) -> Path:
    """The path of the file itself, where `path` is a symbolic link, perhaps to a file that does not exist yet.

    Raises SaveError for links in a circle.
    """
    path = Path(path)
    try:
        found = Path(os.path.realpath(path)) if path.is_symlink() else path
        goes_round = found.is_symlink()
    except (OSError, ValueError):
        return path
    if goes_round:
        raise SaveError(f"cannot write {path}: it is a symbolic link that leads to itself; choose another name.")
    return found


def check_target(path: Path) -> None:
    """Raises SaveError unless `path` names a regular file or a new file.

    A rename onto a folder fails. A rename onto a device such as /dev/null would replace the device by a file.
    """
    try:
        usable = bool(path.name) and (path.is_file() or not path.exists())
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror or error}; choose another name.") from error
    if not usable:
        raise SaveError(f"cannot write {path}: it exists and is not a regular file; give the name of a file.")


def umask() -> int:
    """The permissions that new files of this process do not get."""
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
