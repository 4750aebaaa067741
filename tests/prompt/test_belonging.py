"""A prompt in use: its model is told from fine-tunes of it, and its layout is compared."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from embedgrad.engine.model import load_model
from embedgrad.model.fingerprint import Fingerprint
from embedgrad.prompt.belonging import LayoutWarning, fits
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.template import Template
from embedgrad.util.errors import PromptError
from tests.model import tiny

MESSAGES = [{"role": "system", "content": "{prompt}"}, {"role": "user", "content": "{query}"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of a model, file of a prompt for it)."""
    folder = tmp_path_factory.mktemp("made")
    tiny.write_folder(folder / "m", "qwen2")
    SoftPrompt.from_text(load_model(folder / "m"), "Say it.").save(folder / "p.safetensors")
    return folder / "m", folder / "p.safetensors"


@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "input_layernorm"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_fine_tune_with_the_same_table_is_another_model(
    made: tuple[Path, Path], tmp_path: Path, part: str, layer: int
) -> None:
    folder = Path(shutil.copytree(made[0], tmp_path / "tuned"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.{layer}.{part}.weight"] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PromptError, match=r"tuned has its embedding rows and other layers"):
        SoftPrompt.load(made[1], load_model(folder))


@pytest.mark.parametrize(
    "options", [{"dtype": "bf16"}, {"weights": "int8"}, {"weights": "int4"}, {"weights": "stored"}]
)
def test_the_same_model_loaded_otherwise(made: tuple[Path, Path], options: dict[str, Any]) -> None:
    SoftPrompt.load(made[1], load_model(made[0], **options))


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_same_model_in_another_file(tmp_path: Path, kind: str, family: str) -> None:
    model = tiny.write_folder(tmp_path / "m", family)
    tiny.write_gguf(tmp_path / "m.gguf", model, kind=kind)
    folder, file = (load_model(tmp_path / name).fingerprint for name in ("m", "m.gguf"))
    assert not folder.differs(file)
    assert not file.differs(folder)
    tiny.write_folder(tmp_path / "other", family, seed=1)
    assert load_model(tmp_path / "other").fingerprint.differs(file)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_the_same_model_quantised(tmp_path: Path, kind: str) -> None:
    model = tiny.write_folder(tmp_path / "m", "qwen2", intermediate_size=64)
    tiny.write_gguf(tmp_path / "m.gguf", model, kind=kind)
    wide, narrow = (load_model(tmp_path / name).fingerprint for name in ("m", "m.gguf"))
    assert wide.exact
    assert not narrow.exact
    assert not wide.differs(narrow)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), st.integers(0, 19), st.floats(0.01, 3))
@settings(max_examples=60, deadline=None)
def test_rounded_is_the_same_and_moved_is_not(numbers: list[float], at: int, by: float) -> None:
    values = torch.tensor(numbers)
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        assert not Fingerprint(values, True).differs(Fingerprint(values.to(kind).float(), True))
    moved = values.clone()
    moved[at % len(moved)] += by * (1 + moved[at % len(moved)].abs())
    assert Fingerprint(values, True).differs(Fingerprint(moved, True))


def test_files_of_earlier_versions_have_no_fingerprint(made: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_model(made[0])
    prompt = SoftPrompt.load(made[1], model)
    object.__setattr__(prompt, "fingerprint", None)
    prompt.save(tmp_path / "old.safetensors")
    assert SoftPrompt.load(tmp_path / "old.safetensors", model).fingerprint is None


CHANGED = {
    "a sentence in front": "Be kind. " + tiny.CHAT_TEMPLATE,
    "other line ends": tiny.CHAT_TEMPLATE.replace("'\n'", "'\n\n'"),
    "other roles": tiny.CHAT_TEMPLATE.replace("message['role']", "message['role'] | upper"),
    "no chat template": None,
}


@pytest.mark.parametrize("name", CHANGED)
def test_another_layout_is_said_once(made: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(made[0], tmp_path / "m"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHANGED[name]}))
    with pytest.warns(LayoutWarning, match=r"than when it was made|cannot be used with m") as told:
        SoftPrompt.load(made[1], load_model(folder))
    assert len(told) == 1
    assert "\n" not in str(told[0].message)


@settings(max_examples=30, deadline=None)
@given(
    content=st.text("ab {}\n", max_size=8),
    variables=st.dictionaries(st.sampled_from(["x", "enable_thinking"]), st.booleans()),
)
def test_an_unchanged_layout_gives_no_word(made: tuple[Path, Path], content: str, variables: dict[str, Any]) -> None:
    model = load_model(made[0])
    messages = [{"role": "user", "content": content + "{prompt}" + content}, {"role": "user", "content": "{query}"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error", LayoutWarning)
        SoftPrompt.from_text(model, "Say it.", Template.chat(messages, variables=variables)).check_model(model)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_forged_layouts(data: st.DataObject) -> None:
    """A layout shows the whole prompt, in its order and with its ids, or it was forged."""
    token_ids = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=5))
    times = data.draw(st.integers(0, 3))
    rows = [-1, *[*range(len(token_ids)), -1] * times]
    ids = [token_ids[row] if row >= 0 else data.draw(st.integers(-1, 50)) for row in rows]
    assert fits(ids, rows, token_ids)
    assert not fits([*ids, 1], rows, token_ids)
    assert not fits([-2, *ids[1:]], rows, token_ids)
    if times:
        at = data.draw(st.sampled_from([i for i, row in enumerate(rows) if row >= 0]))
        assert not fits([id + (i == at) for i, id in enumerate(ids)], rows, token_ids)
        assert len(token_ids) == 1 or not fits(ids, [-1 if i == at else row for i, row in enumerate(rows)], token_ids)


@pytest.mark.parametrize("value", ["yesterday", "2026-02-30", "30.1.2026", 20260130, None])
def test_dates_that_are_none(value: Any) -> None:
    with pytest.raises(Exception, match="a date like 2026-01-30"):
        Template.chat(MESSAGES, variables={"strftime_now": value})
