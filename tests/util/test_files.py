"""Whole-or-nothing files: links stay links, permissions stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from embedgrad.util.errors import SaveError
from embedgrad.util.files import write_atomic


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("hops", [1, 2])
def test_a_link_stays_a_link(tmp_path: Path, exists: bool, relative: bool, hops: int) -> None:
    (tmp_path / "kept").mkdir()
    target = tmp_path / "kept" / "file"
    if exists:
        target.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to("kept/file" if relative else target)
    if hops == 2:
        (tmp_path / "second").symlink_to("link")
        link = tmp_path / "second"
    write_atomic(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path / "kept")) == ["file"]


def test_a_link_to_a_folder_or_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("folder", "loop"):
        with pytest.raises(SaveError):
            write_atomic(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_permissions_stay(tmp_path: Path, mode: int) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(mode)
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode
