"""Model folders on disk: what is written is what is read, and damage is one sentence."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from embedgrad.model.checkpoint import read_checkpoint
from embedgrad.util.errors import ModelError
from tests.model import tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "tiny-llama"
    tiny.write_folder(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "tiny-qwen"
    tiny.write_folder(folder, "qwen2", shard_bytes=20_000)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def refused(path: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        read_checkpoint(path)
    return one_sentence(caught.value)


def one_sentence(error: ModelError) -> str:
    message = str(error)
    assert "\n" not in message
    assert len(message) < 600
    return message


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_read(tmp_path: Path, family: str, dtype: torch.dtype, tied: bool) -> None:
    bias = {"attention_bias": True} if family in ("llama", "qwen3") else {}
    shard_bytes = 20_000 if tied else None
    model = tiny.write_folder(tmp_path, family, dtype=dtype, shard_bytes=shard_bytes, tie_word_embeddings=tied, **bias)
    checkpoint = read_checkpoint(tmp_path)
    expected = model.state_dict()
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == tied
    assert checkpoint.config.tied == tied
    assert checkpoint.name == tmp_path.name
    assert set(checkpoint.tensors.names()) == set(expected) - ({"lm_head.weight"} if tied else set())
    for name in checkpoint.tensors.names():
        tensor = checkpoint.tensors.get(name)
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name])
        assert checkpoint.tensors.raw(name) is None


def test_tensors_are_views_of_the_mapping(whole: Path) -> None:
    tensors = read_checkpoint(whole).tensors
    first, again = (tensors.get("model.embed_tokens.weight") for _ in range(2))
    assert first.data_ptr() == again.data_ptr()
    pointer = first.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= pointer < end:
            assert line.endswith("model.safetensors")
            return
    pytest.fail("the tensor lies in no mapping")


def test_lm_head_stored_beside_a_tied_embedding(tmp_path: Path) -> None:
    model = tiny.write_folder(tmp_path, tie_word_embeddings=True)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path).config.tied
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, tmp_path / "model.safetensors")
    assert "tie_word_embeddings" in refused(tmp_path)


def test_old_inverse_frequencies_are_passed_over(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, copy / "model.safetensors")
    assert set(read_checkpoint(copy).tensors.names()) == set(weights)


def test_wrong_shape_missing_and_unknown_tensors(copy: Path) -> None:
    file = copy / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "model.norm.weight": torch.ones(33)}, file)
    message = refused(copy)
    assert "model.norm.weight" in message
    assert "[33]" in message
    assert "[32]" in message
    save_file({name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}, file)
    message = refused(copy)
    assert "model.layers.1.mlp.gate_proj.weight and 2 more tensors" in message
    save_file({**weights, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, file)
    assert "model.layers.0.self_attn.q_proj.bias" in refused(copy)
    save_file({**weights, "model.norm.weight": torch.ones(32, dtype=torch.int32)}, file)
    message = refused(copy)
    assert "model.norm.weight" in message
    assert "I32" in message


def test_missing_and_empty_things(tmp_path: Path, copy: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "does not exist" in refused("a\0b")
    (tmp_path / "empty").mkdir()
    assert "neither config.json nor a .gguf file" in refused(tmp_path / "empty")
    (tmp_path / "empty.gguf").touch()
    assert "is empty" in refused(tmp_path / "empty.gguf")
    (copy / "model.safetensors").write_bytes(b"")
    assert "is empty" in refused(copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    message = refused(copy)
    assert "no *.safetensors file" in message
    assert "pickled" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\udcff"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_files_that_are_not_json(copy: Path, file: str, text: str) -> None:
    (copy / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert file in refused(copy)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path, vocab_size=tiny.VOCABULARY - 1)
    message = refused(tmp_path)
    assert "up to 399" in message
    assert "399 rows" in message


def test_more_rows_than_tokens_are_normal(whole: Path) -> None:
    checkpoint = read_checkpoint(whole)
    assert checkpoint.tokenizer.vocab_size == tiny.VOCABULARY < checkpoint.config.vocab_size
    assert checkpoint.tokenizer.token(checkpoint.config.vocab_size - 1) == ""
    assert checkpoint.tokenizer.decode([checkpoint.config.vocab_size - 1]) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: index.pop("weight_map"), "weight_map"),
        (lambda index: index.update(weight_map=[]), "weight_map"),
        (lambda index: index.update(weight_map={}), "weight_map"),
        (lambda index: index["weight_map"].update(x=3), "weight_map"),
        (lambda index: index["weight_map"].update(x="../model.safetensors"), "own folder"),
        (lambda index: index["weight_map"].update(x="model-9.safetensors"), "lacks model-9.safetensors"),
        (lambda index: index["weight_map"].update(x=index["weight_map"]["model.norm.weight"]), "lists x"),
    ],
)
def test_index_damage(sharded: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    edit(folder / "model.safetensors.index.json", change)
    assert said in refused(folder)


def test_a_missing_or_repeated_shard(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    assert read_checkpoint(folder).tensors.names()
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    shutil.copy(second, first)
    assert "in another file" in refused(folder)
    first.unlink()
    assert f"lacks {first.name}" in refused(folder)


DAMAGE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@DAMAGE
@given(st.data())
def test_truncated_safetensors(copy: Path, whole: Path, data: st.DataObject) -> None:
    content = (whole / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    length = data.draw(st.one_of(st.integers(0, header), st.integers(0, len(content) - 1)))
    (copy / "model.safetensors").write_bytes(content[:length])
    assert "model.safetensors" in refused(copy)


@DAMAGE
@given(st.data())
def test_bit_flips_in_a_safetensors_header(copy: Path, whole: Path, data: st.DataObject) -> None:
    """Every flip is refused, or changes nothing that is read (blanks, the order of offsets of equal tensors...)."""
    content = bytearray((whole / "model.safetensors").read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    positions = st.one_of(st.integers(0, 8 * 8 - 1), st.integers(0, 8 * header - 1))
    for bit in data.draw(st.lists(positions, min_size=1, max_size=3, unique=True)):
        content[bit // 8] ^= 1 << bit % 8
    (copy / "model.safetensors").write_bytes(content)
    try:
        checkpoint = read_checkpoint(copy)
        for name, shape in checkpoint.config.shapes().items():
            assert checkpoint.tensors.get(name).shape == shape
    except ModelError as error:
        one_sentence(error)


@DAMAGE
@given(st.data())
def test_damaged_json_files(copy: Path, whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json"]))
    content = bytearray((whole / name).read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
    for other in whole.iterdir():
        if other.suffix == ".json":
            shutil.copy(other, copy / other.name)
    (copy / name).write_bytes(content)
    try:
        read_checkpoint(copy).tokenizer.encode("It's a test 123")
    except ModelError as error:
        one_sentence(error)
