"""A path that holds no model: the sentence says what it is, and what to give instead."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedgrad.model.checkpoint import read_checkpoint
from embedgrad.util.errors import ModelError
from tests.model import tiny

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 9\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "m"
    tiny.write_folder(folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_of_the_folder(whole: Path, name: str) -> None:
    message = refused(whole / name)
    assert f"give the folder that holds it: {whole}." in message
    assert "fetch" not in message


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [(POINTER, "git lfs pull"), ("<!DOCTYPE html><html>", "web page"), ("\n<html lang=en>", "web page")],
)
def test_stand_ins_for_files(copy: Path, name: str, content: str, said: str) -> None:
    (copy / name).write_text(content)
    message = refused(copy)
    assert said in message
    assert str(copy / name) in message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.gguf", POINTER.encode(), "git lfs pull"),
        ("m.gguf", b"", "empty"),
        ("m.gguf", b"<!doctype HTML>", "web page"),
        ("m.gguf", b"tjgg\1\0\0\0", "GGUF has replaced"),
        ("m.zip", b"PK\x03\x04", "unpack"),
        ("m.gguf.gz", b"\x1f\x8b", "unpack"),
        ("pytorch_model.bin", b"PK\x03\x04", "pickled"),
        ("notes.doc", b"hello", "neither a GGUF file nor a model folder"),
        ("m.gguf", b"hello", "not a complete GGUF file"),
        ("m.gguf", struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
        ("m.gguf", struct.pack("<4sIQQ", b"GGUF", 4, 0, 0), "version 4, which is not supported"),
        ("m.gguf", struct.pack("<4sIII", b"GGUF", 1, 0, 0), "version 1, which is not supported"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refused(tmp_path / name)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([4, 5, 31, 32, 33, 36, 77, 2**31]), st.sampled_from(["attn_q", "ffn_down", "attn_norm"]))
def test_unknown_tensor_types(tmp_path_factory: pytest.TempPathFactory, kind: int, part: str) -> None:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    tiny.write_gguf(path, tiny.random_model("llama"))
    data = bytearray(path.read_bytes())
    name = f"blk.0.{part}.weight".encode()
    at = data.find(name) + len(name)
    at += 4 + 8 * struct.unpack_from("<I", data, at)[0]
    struct.pack_into("<I", data, at, kind)
    path.write_bytes(data)
    message = refused(path)
    assert f"type {kind}, which is unsupported" in message
    assert "fetch" not in message


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "LORA", "base_model_name_or_path": "org/base"}, ["LORA", "org/base"]),
        ({"peft_type": "PREFIX_TUNING"}, ["PREFIX_TUNING"]),
        ([], []),
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_adapters(copy: Path, config: object, said: list[str], merged: bool) -> None:
    """With or without a model beside them: they would not be applied."""
    if not merged:
        (copy / "config.json").unlink()
    (copy / "adapter_config.json").write_text(json.dumps(config))
    message = refused(copy)
    assert "holds an adapter" in message
    assert "merge" in message
    assert all(part in message for part in said)


def test_the_hubs_cache(tmp_path: Path, whole: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    assert "snapshots/" in refused(repository)
    shutil.copytree(whole, repository / "snapshots" / "0123abc")
    for given_path in (repository, repository / "snapshots"):
        assert str(repository / "snapshots" / "0123abc") in refused(given_path)
    assert "hub's cache" in refused(tmp_path / "hub")
    assert read_checkpoint(repository / "snapshots" / "0123abc").name == "org/name"


def test_folders_that_are_no_model(tmp_path: Path, whole: Path, copy: Path) -> None:
    assert f"{copy} has one: give that folder" in refused(tmp_path)
    (copy / "config.json").unlink()
    assert "no config.json" in refused(copy)
    (copy / "params.json").write_text("{}")
    assert "publisher's own format" in refused(copy)
