"""Which files of a folder are read: one set of weights, in as many files and types as it was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from embedgrad.data.example import Example
from embedgrad.engine.gradient import loss_and_grad
from embedgrad.engine.model import load_model
from embedgrad.model.files.safetensors import INDEX, ModelFilesWarning, SafetensorsFiles
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.util.errors import ModelError
from tests.model import tiny

ROW = "model.embed_tokens.weight"


def same(folder: Path, model: Any) -> bool:
    return torch.equal(SafetensorsFiles(folder).get(ROW), model.get_input_embeddings().weight)


def test_a_single_file_comes_before_the_index_of_an_earlier_save(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path, "qwen2", shard_bytes=60_000, seed=1)
    shards = {path: path.read_bytes() for path in tmp_path.glob("model-*.safetensors")}
    new = tiny.random_model("qwen2", seed=2)
    new.save_pretrained(tmp_path)
    with pytest.warns(ModelFilesWarning, match="the former is read"):
        assert same(tmp_path, new)
    for path, data in shards.items():
        path.write_bytes(data)
    with pytest.warns(ModelFilesWarning):
        assert same(tmp_path, new)
    assert torch.equal(type(new).from_pretrained(tmp_path).get_input_embeddings().weight, new.model.embed_tokens.weight)
    (tmp_path / "model.safetensors").unlink()
    assert not same(tmp_path, new)


def test_sets_of_several_types_side_by_side(tmp_path: Path) -> None:
    """A model that was saved in several types: the unmarked set, else the widest."""
    fp32 = tiny.write_folder(tmp_path, "qwen2")
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp32.safetensors")
    fp16 = tiny.random_model("qwen2").half()
    for limit in ("5GB", "60KB"):
        fp16.save_pretrained(tmp_path, variant="fp16", max_shard_size=limit)
        assert same(tmp_path, fp32)
    (tmp_path / "model.fp32.safetensors").unlink()
    assert SafetensorsFiles(tmp_path).get(ROW).dtype == torch.float16
    assert (tmp_path / "model.safetensors.index.fp16.json").is_file()
    (tmp_path / "model.fp16.safetensors").unlink()
    assert SafetensorsFiles(tmp_path).get(ROW).dtype == torch.float16
    next(tmp_path.glob("model*fp16-00001*")).unlink()
    with pytest.raises(ModelError, match="lacks"):
        SafetensorsFiles(tmp_path)


def test_files_that_are_not_called_model(tmp_path: Path) -> None:
    model = tiny.write_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert same(tmp_path, model)


TYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["compute", "stored", "fp32", "bf16", "int8"]), st.booleans())
def test_tensors_of_several_types(tmp_path_factory: pytest.TempPathFactory, seed: int, form: str, shards: bool) -> None:
    """Each tensor in a type of its own gives what the same values in float32 give."""
    folder = tmp_path_factory.mktemp("mixed")
    tiny.write_folder(folder, "qwen2", shard_bytes=60_000 if shards else None)
    generator = torch.Generator().manual_seed(seed)
    wide: dict[Path, dict[str, torch.Tensor]] = {}
    for path in folder.glob("model*.safetensors"):
        mixed = {}
        for name, tensor in load_file(path).items():
            mixed[name] = tensor.to(TYPES[int(torch.randint(3, (), generator=generator))])
        save_file(mixed, path, metadata={"format": "pt"})
        wide[path] = {name: tensor.float() for name, tensor in mixed.items()}

    def measured() -> tuple[float, torch.Tensor]:
        model = load_model(folder, weights=form)
        return loss_and_grad(model, SoftPrompt.from_text(model, "Rate it."), [Example("a film", "good")])

    loss, grad = measured()
    for path, tensors in wide.items():
        save_file(tensors, path, metadata={"format": "pt"})
    expected, expected_grad = measured()
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-5)


def test_the_index_names_its_own_folder_only(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path, "qwen2", shard_bytes=60_000)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../x.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="its own folder"):
        SafetensorsFiles(tmp_path)
