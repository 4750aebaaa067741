"""Downloads from PyPI: nothing of a file runs before its sha256 was compared."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from embedgrad.tasks import pypi
from embedgrad.util.errors import DataError

SETUP = """import pathlib
pathlib.Path({marker!r}).touch()
from setuptools import setup
setup(name="forged", version="1")
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can find."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_CONSTRAINT", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(folder: Path) -> Path:
    path = folder / "forged-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("forged-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: forged\nVersion: 1\n")
        file.writestr("forged-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("forged-1.dist-info/RECORD", "")
    return path


def test_the_setup_of_a_forged_source_distribution_does_not_run(index: Path, tmp_path: Path) -> None:
    marker, cache = tmp_path / "it ran", tmp_path / "cache"
    with zipfile.ZipFile(index / "forged-1.zip", "w") as file:
        file.writestr("forged-1/setup.py", SETUP.format(marker=str(marker)))
        file.writestr("forged-1/PKG-INFO", "Metadata-Version: 1.0\nName: forged\nVersion: 1\n")
    with pytest.raises(DataError, match=r"cannot download forged==1 \(the index offers another file .*by hand\.$"):
        pypi.archive("forged==1", "forged-1.zip", "0" * 64, cache, source=True)
    assert not marker.exists()
    assert not list(cache.iterdir())


def test_the_published_file_is_fetched_and_kept(index: Path, tmp_path: Path) -> None:
    published = wheel(index).read_bytes()
    sha256 = hashlib.sha256(published).hexdigest()
    path = pypi.archive("forged==1", "forged-1-py3-none-any.whl", sha256, tmp_path / "cache")
    assert path.read_bytes() == published
    assert [one.name for one in (tmp_path / "cache").iterdir()] == [path.name]


def test_a_package_that_is_not_there_is_named(index: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot download absent==1 \(.*absent==1.*\); put absent-1.zip into"):
        pypi.archive("absent==1", "absent-1.zip", "0" * 64, tmp_path)


def test_a_cache_that_is_no_folder_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot download forged==1"):
        pypi.archive("forged==1", "forged-1.zip", "0" * 64, tmp_path / "file" / "cache")
