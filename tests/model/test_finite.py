"""NaN and infinity in weights: refused when the model is opened, or else when the first result is not finite."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from embedgrad.data.example import Example
from embedgrad.engine.gradient import loss_and_grad
from embedgrad.engine.model import Model, load_model
from embedgrad.engine.scorer import score
from embedgrad.evaluation.evaluate import evaluate
from embedgrad.generation.generate import generate
from embedgrad.model import finite
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.template import Template
from embedgrad.util.errors import ConfigError, ModelError, PromptError, TrainingError
from tests.model import tiny

BATCH = [Example([10, 11], [20, 21]), Example([12], [30])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "m"
    tiny.write_folder(folder, "qwen3", num_hidden_layers=2)
    return folder


def damaged(whole: Path, folder: Path, name: str, at: float, value: float, dtype: torch.dtype = torch.float32) -> Path:
    """A copy of the model with one number replaced: that at the share `at` of the tensor `name`."""
    folder.mkdir(exist_ok=True)
    for file in whole.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {key: x.to(dtype) for key, x in load_file(whole / "model.safetensors").items()}
    numbers = tensors[name].view(-1)
    numbers[min(int(at * numbers.numel()), numbers.numel() - 1)] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


def prompt_of(model: Model) -> SoftPrompt:
    return SoftPrompt.from_ids(model, [9, 30, 200], template=Template.plain())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_number_is_looked_at_that_is_converted(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(load_file(whole / "model.safetensors"))))
    value, at = data.draw(st.sampled_from([math.nan, math.inf, -math.inf])), data.draw(st.floats(0, 1))
    form = data.draw(st.sampled_from(["compute", "bf16", "int8", "int4"]))
    folder = damaged(whole, tmp_path_factory.mktemp("nan"), name, at, value)
    quantised = form.startswith("int") and name.endswith("weight") and "norm" not in name and "embed" not in name
    if "embed" in name and form.startswith("int"):  # the table stays as it is in the file
        at = 0.0
        folder = damaged(whole, folder, name, at, value)
    with pytest.raises(ModelError, match=name if not quantised else "cannot be quantised"):
        load_model(folder, weights=form)


def test_numbers_too_large_for_the_compute_type(tmp_path: Path, whole: Path) -> None:
    folder = damaged(whole, tmp_path / "m", "model.norm.weight", 0.5, 1e300, torch.float64)
    load_model(folder, "float64", backend="reference")
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds NaN or infinity as float32"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1", "Q4_K"])
@pytest.mark.parametrize("weights", ["stored", "compute"])
def test_scales_of_blocks(tmp_path: Path, kind: str, weights: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_model("llama", num_hidden_layers=1, **sizes), kind=kind)
    load_model(tmp_path / "m.gguf", weights=weights)
    from embedgrad.model.files.gguf import GgufFile

    entry = GgufFile(tmp_path / "m.gguf")._entries["model.layers.0.mlp.down_proj.weight"]
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[entry.start : entry.start + 2] = b"\0\x7e"  # a NaN as float16, which is the first block's scale
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"down_proj\.weight holds NaN or infinity"):
        load_model(tmp_path / "m.gguf", weights=weights)


def test_what_the_sample_misses_is_refused_by_the_first_result(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "SAMPLED", 1)
    folder = damaged(whole, tmp_path / "m", "model.layers.1.mlp.up_proj.weight", 0.9, math.nan)
    model = load_model(folder, weights="stored")
    prompt = prompt_of(model)
    with pytest.raises(TrainingError, match="the loss is not finite, although the prompt is"):
        loss_and_grad(model, prompt, BATCH)
    with pytest.raises(TrainingError, match="the loss is not finite, although the prompt is"):
        score(model, prompt, BATCH)
    with pytest.raises(ConfigError, match="NaN"):
        generate(model, prompt, ["a"])
    with pytest.raises((ConfigError, TrainingError), match=r"NaN|not finite"):
        evaluate(model, prompt, [Example("a", "b")], labels=["b", "c"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_prompt_that_is_not_finite(whole: Path, backend: str, value: float) -> None:
    model = load_model(whole, backend=backend)
    prompt = prompt_of(model)
    embeddings = prompt.embeddings.clone()
    embeddings[1, 0] = value
    for call in (loss_and_grad, score):
        with pytest.raises(PromptError, match="row 1 of the prompt's embeddings holds NaN or infinity"):
            call(model, prompt.replace(embeddings=embeddings), BATCH)  # type: ignore[operator]
