"""Hub ids, without a network: a stand-in for the download, and the hub's own cache laid out on disk."""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from embedgrad.model.checkpoint import read_checkpoint
from embedgrad.model.files.hub import PATTERNS, resolve
from embedgrad.util.errors import ModelError
from tests.model import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_existing_paths_come_back_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")


@pytest.mark.parametrize("text", ["./missing", "/not/here", "one", "a/b/c", "a/../b", "../x/y", "file.gguf", "a b/c"])
def test_what_is_no_id_is_a_missing_path(text: str) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        resolve(text)


def test_a_path_that_cannot_be_looked_at_is_refused() -> None:
    with pytest.raises(ModelError, match=r"cannot be opened: .*too long"):
        resolve("x" * 300)


def test_download_is_restricted_to_what_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["README.md"])
    assert resolve("org/some-model.v1") == tmp_path
    assert resolve("org/name@refs/pr/3") == tmp_path
    assert [(name, options["revision"]) for name, options in calls] == [
        ("org/some-model.v1", None),
        ("org/name", "refs/pr/3"),
    ]
    patterns = calls[0][1]["allow_patterns"]
    assert patterns == list(PATTERNS)
    wanted = ["config.json", "tokenizer.json", "model.safetensors", "model-00001-of-00002.safetensors"]
    unwanted = ["pytorch_model.bin", "consolidated.safetensors", "modeling.py", "model.onnx"]
    for file in wanted:
        assert any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
    for file in unwanted:
        assert not any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


def test_failed_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise RuntimeError("404 Client Error.\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError) as caught:
        resolve("org/name")
    assert "404 Client Error" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"pip install embedgrad\[hub\]"):
        resolve("org/name")


def test_cached_snapshot_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    tiny.write_folder(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = resolve("org/tiny")
    assert found.samefile(snapshot)
    assert read_checkpoint(found).name == "org/tiny"
    with pytest.raises(ModelError, match="could not be fetched"):
        resolve("org/absent")


FILES = [
    "m-Q4_K_M.gguf",
    "m-Q8_0.gguf",
    "big/m-F16-00001-of-00002.gguf",
    "big/m-F16-00002-of-00002.gguf",
    "m-mmproj.gguf",
]


def repository(monkeypatch: pytest.MonkeyPatch, folder: Path, files: list[str]) -> list[str]:
    """A stand-in for a repository; returns the names of the GGUF files that are downloaded."""
    fetched: list[str] = []

    def one(name: str, file: str, revision: str | None = None) -> str:
        fetched.append(file)
        tiny.write_gguf(folder / file.replace("/", "-"), tiny.random_model("llama"))
        return str(folder / file.replace("/", "-"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(folder))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision=None: ["README.md", *files])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)
    return fetched


@pytest.mark.parametrize(
    ("wanted", "file"),
    [
        ("org/name:Q4_K_M", "m-Q4_K_M.gguf"), ("org/name:q8_0", "m-Q8_0.gguf"),
        ("org/name@v1:m-Q8_0.gguf", "m-Q8_0.gguf"),
        ("org/name:F16", "big/m-F16-00001-of-00002.gguf"),
    ],
)  # fmt: skip
def test_one_of_several_gguf_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: str, file: str) -> None:
    fetched = repository(monkeypatch, tmp_path, FILES)
    assert read_checkpoint(resolve(wanted)).config.family == "llama"
    assert fetched == [file]


def test_the_only_gguf_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetched = repository(monkeypatch, tmp_path, ["name.Q5_K_S.gguf"])
    assert resolve("org/name").name == "name.Q5_K_S.gguf"
    assert fetched == ["name.Q5_K_S.gguf"]


def test_gguf_files_that_are_not_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    repository(monkeypatch, tmp_path, FILES)
    for wanted, said in (("org/name", "several GGUF files"), ("org/name:Q2_K", "no GGUF file Q2_K")):
        with pytest.raises(ModelError, match=said) as caught:
            resolve(wanted)
        assert "m-Q4_K_M.gguf, m-Q8_0.gguf" in str(caught.value)
        assert "00002-of" not in str(caught.value)
    repository(monkeypatch, tmp_path, [])
    with pytest.raises(ModelError, match="has no GGUF files"):
        resolve("org/name:Q2_K")


def test_a_gguf_file_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text(COMMIT)
    tiny.write_gguf(snapshot / "tiny-Q8_0.gguf", tiny.random_model("llama"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for wanted in ("org/tiny", "org/tiny:Q8_0"):
        assert resolve(wanted).samefile(snapshot / "tiny-Q8_0.gguf")
