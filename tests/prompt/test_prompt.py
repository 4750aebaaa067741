"""Soft prompts: what they hold, their file, and that a damaged or foreign one is refused in a sentence."""

from __future__ import annotations

import gc
import hashlib
import json
import struct
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.data.example import Example
from embedgrad.engine.model import load_model
from embedgrad.prompt import prompt_file
from embedgrad.prompt.belonging import hash_rows
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import render
from embedgrad.prompt.template import Template
from embedgrad.util.errors import PromptError, SaveError
from tests.model.tiny import write_folder
from tests.prompt.fake_model import CHAT_TEMPLATES, FakeModel, fake_model

MODEL = fake_model("chatml")
TEMPLATES = [
    Template.plain(),
    Template.text("{query}\n{prompt}\n{query}", end=False),
    Template.chat(
        [{"role": "system", "content": "a {prompt}"}, {"role": "user", "content": "{query} {prompt}"}],
        CHAT_TEMPLATES["llama3"],
        {"x": [1]},
    ),
]


def tuned(template: Template | None = None, dtype: torch.dtype = torch.float32) -> SoftPrompt:
    """A prompt a little away from its anchor."""
    prompt = SoftPrompt.from_ids(MODEL, [40, 41, 42], template)
    noise = torch.randn(prompt.anchor.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return prompt.replace(embeddings=prompt.anchor.to(dtype) + 0.1 * noise, metadata={"trust_region": {"tau": 0.95}})


def equal(one: SoftPrompt, other: SoftPrompt) -> bool:
    tensors = [(one.embeddings, other.embeddings), (one.anchor, other.anchor)]
    names = ["token_ids", "text", "template", "model_name", "anchor_hash", "metadata", "layout_ids", "layout_rows"]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors) and all(
        getattr(one, name) == getattr(other, name) for name in names
    )


def test_a_new_prompt_is_its_anchor_and_belongs_to_its_model() -> None:
    prompt = SoftPrompt.from_text(MODEL, "Classify the review.")
    assert torch.equal(prompt.embeddings, MODEL.table[prompt.token_ids])
    assert torch.equal(prompt.anchor, prompt.embeddings)
    assert prompt.embeddings.data_ptr() != prompt.anchor.data_ptr()
    assert torch.allclose(prompt.similarity(), torch.ones(len(prompt.token_ids), dtype=torch.float64), atol=1e-12)
    assert prompt.text == "Classify the review."
    assert prompt.template.messages == (("system", "{prompt}"), ("user", "{query}"))
    expected = hashlib.sha256(struct.pack("<qq", *prompt.anchor.shape) + prompt.anchor.numpy().astype("<f4").tobytes())
    assert prompt.anchor_hash == expected.hexdigest() == hash_rows(prompt.anchor)
    prompt.check_model(MODEL)


def test_the_layout_is_the_context_with_the_query_cut_out() -> None:
    prompt = SoftPrompt.from_text(MODEL, "Classify the review.")
    rendered = render(MODEL, prompt, Example([77], "x"))
    count = rendered.target_mask.index(True)
    assert [77 if token == -1 else token for token in prompt.layout_ids] == rendered.ids[:count]
    assert prompt.layout_rows == rendered.prompt_rows[:count]


def test_replace_leaves_the_original_alone_and_keeps_the_rest() -> None:
    prompt = tuned()
    other = prompt.replace(embeddings=2 * prompt.embeddings)
    assert torch.equal(other.embeddings, 2 * prompt.embeddings)
    assert other.metadata == prompt.metadata
    assert other.metadata is not prompt.metadata
    assert equal(other.replace(embeddings=prompt.embeddings), prompt)


def test_similarity_of_turned_and_zero_rows() -> None:
    prompt = tuned()
    rows = torch.stack([-3 * prompt.anchor[0], torch.zeros(8), 1e-30 * prompt.anchor[2]])
    assert prompt.replace(embeddings=rows).similarity().tolist() == pytest.approx([-1.0, 0.0, 1.0])
    assert prompt.similarity().dtype == torch.float64


@pytest.mark.parametrize(
    "embeddings",
    [torch.zeros(2, 8), torch.zeros(3, 9), torch.zeros(24), torch.zeros(3, 8).half(), torch.zeros(3, 8).long()],
)
def test_embeddings_of_another_shape_or_type_are_refused(embeddings: torch.Tensor) -> None:
    with pytest.raises(PromptError, match=r"embeddings"):
        tuned().replace(embeddings=embeddings)


def test_another_model_is_refused_by_name() -> None:
    prompt = tuned()
    cases = {
        "embedding rows are not those of other": fake_model("chatml", seed=1, name="other"),
        "other has hidden size 16": fake_model("chatml", hidden_size=16, name="other"),
        "other has 41 ids only": fake_model("chatml", vocab_size=41, name="other"),
    }
    for said, model in cases.items():
        for _ in range(2):
            with pytest.raises(PromptError, match=f"made for the model fake.* {said}"):
                prompt.check_model(model)
    same = fake_model("chatml", name="a copy")
    prompt.check_model(same)


def test_a_prompt_serves_its_model_in_another_type(tmp_path: Path) -> None:
    """A checkpoint of float32 or float16 computed in bfloat16 has its embedding rows rounded."""
    write_folder(tmp_path / "tiny")
    write_folder(tmp_path / "other", seed=1)
    wide, narrow = (load_model(tmp_path / "tiny", dtype=dtype) for dtype in ("float32", "bfloat16"))
    for made_by, used_by in ((wide, narrow), (narrow, wide)):
        prompt = SoftPrompt.from_text(made_by, "Say what it is.")
        assert not torch.equal(prompt.anchor, used_by.embedding_rows(prompt.token_ids))
        prompt.check_model(used_by)
        for dtype in ("float32", "bfloat16"):
            with pytest.raises(PromptError, match="embedding rows are not those of other"):
                prompt.check_model(load_model(tmp_path / "other", dtype=dtype))


def test_checking_again_is_free_and_keeps_no_model_alive() -> None:
    model = fake_model("chatml")
    prompt = tuned()
    render(model, prompt, Example("film", "x"))
    for _ in range(3):
        prompt.replace(embeddings=prompt.embeddings + 1).check_model(model)
    assert model.rows_asked == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("template", [None, *TEMPLATES], ids=["default", "plain", "text", "chat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_file_gives_back_what_was_saved(tmp_path: Path, template: Template | None, dtype: torch.dtype) -> None:
    prompt = tuned(template, dtype)
    path = tmp_path / "prompt.safetensors"
    prompt.save(path)
    again = SoftPrompt.load(path, MODEL)
    assert equal(again, prompt)
    for query, target in (("a film", "x"), ([50, 51], [52])):
        assert render(MODEL, again, Example(query, target)) == render(MODEL, prompt, Example(query, target))
    assert [file.name for file in tmp_path.iterdir()] == ["prompt.safetensors"]
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@settings(deadline=None, max_examples=30)
@given(
    st.text(max_size=20),
    st.text(max_size=10),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)
def test_any_text_name_and_metadata_survive(
    tmp_path_factory: pytest.TempPathFactory, text: str, name: str, value: object
) -> None:
    path = tmp_path_factory.mktemp("prompt") / "p.safetensors"
    base = tuned()
    fields = {field: getattr(base, field) for field in base.__dataclass_fields__}
    prompt = SoftPrompt(**{**fields, "text": text, "model_name": name, "metadata": {"value": value}})
    prompt.save(path)
    assert equal(SoftPrompt.load(path), prompt)


def test_a_file_is_plain_safetensors_with_the_documented_contents(tmp_path: Path) -> None:
    from safetensors import safe_open

    tuned().save(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", "pt") as file:
        assert set(file.keys()) == {"embeddings", "anchor", "token_ids", "layout_ids", "layout_rows"}
        metadata = file.metadata()
    assert json.loads(metadata["model"]) == "fake"
    assert json.loads(json.loads(metadata["metadata"])) == {"trust_region": {"tau": 0.95}}
    assert metadata["format"] == "embedgrad-prompt"
    assert json.loads(metadata["library"]).startswith("embedgrad ")


def saved() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tuned().save(Path(folder) / "p")
        return (Path(folder) / "p").read_bytes()


DATA = saved()


def load_bytes(folder: Path, data: bytes) -> SoftPrompt:
    path = folder / "damaged.safetensors"
    path.write_bytes(data)
    return SoftPrompt.load(path, MODEL)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 8 * len(DATA) - 1))
def test_a_flipped_bit_is_refused(tmp_path_factory: pytest.TempPathFactory, bit: int) -> None:
    data = bytearray(DATA)
    data[bit // 8] ^= 1 << (bit % 8)
    folder = tmp_path_factory.mktemp("bits")
    try:
        prompt = load_bytes(folder, bytes(data))
    except PromptError as error:
        said = str(error)
    else:
        assert equal(prompt, tuned())  # one spelling of the same header for another
        return
    assert "\n" not in said
    assert "damaged.safetensors" in said


@settings(deadline=None, max_examples=100)
@given(st.integers(0, len(DATA) - 1), st.binary(max_size=20))
def test_a_cut_or_overwritten_file_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes) -> None:
    folder = tmp_path_factory.mktemp("cut")
    for data in (DATA[:cut], DATA[:cut] + junk, junk, junk + DATA, DATA + b"x" + junk):
        if data != DATA:
            with pytest.raises(PromptError):
                load_bytes(folder, data)


def forged(tensors: dict[str, Any] | None = None, fields: dict[str, Any] | None = None, **metadata: str) -> bytes:
    """A file with other contents and a right checksum."""
    from safetensors.torch import load, save

    contents = {**load(DATA), **(tensors or {})}
    contents = {name: tensor for name, tensor in contents.items() if tensor is not None}
    header = json.loads(DATA[8 : 8 + int.from_bytes(DATA[:8], "little")])["__metadata__"]
    header |= {name: json.dumps(value) for name, value in (fields or {}).items() if value is not None}
    header |= metadata
    for name in [name for name, value in (fields or {}).items() if value is None]:
        del header[name]
    del header["checksum"]
    header["checksum"] = prompt_file._checksum(contents, header)
    return save(contents, header)


ANCHOR = tuned().anchor
NOT_FINITE = ANCHOR.clone()
NOT_FINITE[1, 1] = torch.nan
HOSTILE = {
    "lacks embeddings": forged({"embeddings": None}),
    "lacks text": forged(fields={"text": None}),
    "lacks template": forged(fields={"template": None}),
    "metadata that is not text": forged(fields={"text": 3}),
    "metadata that is not JSON": forged(text="{"),
    "metadata is not a JSON object": forged(fields={"metadata": "[]"}),
    "metadata is not a JSON": forged(fields={"metadata": "[" * 100_000}),
    "not a prompt file": forged(format="other"),
    "has version '7'": forged(version="7"),
    "numbers that are not finite": forged({"embeddings": NOT_FINITE}),
    "must be float32": forged({"embeddings": ANCHOR.half()}),
    "its anchor float32": forged({"anchor": ANCHOR.double()}),
    "must have one shape": forged({"embeddings": ANCHOR[:2].contiguous()}),
    "one shape": forged({"embeddings": torch.zeros(0, 8), "anchor": torch.zeros(0, 8)}),
    "one shape ": forged({"embeddings": torch.zeros(24), "anchor": torch.zeros(24)}),
    "does not match the anchor's hash": forged({"anchor": ANCHOR + 1}),
    "anchor's hash": forged(fields={"anchor_hash": "0"}),
    "must be a list of int64": forged({"token_ids": torch.zeros(3)}),
    "a list of int64": forged({"layout_ids": torch.zeros(3, 3, dtype=torch.int64)}),
    "token ids are negative": forged({"token_ids": torch.tensor([1, -1, 2])}),
    "must not have 2 token ids": forged({"token_ids": torch.tensor([1, 2])}),
    "layout does not fit": forged({"layout_rows": torch.tensor([0, 1, 3])}),
    "layout does not": forged({"layout_ids": torch.tensor([0])}),
    "not valid JSON": forged(fields={"template": "{"}),
    "must be chat, text or plain": forged(fields={"template": '{"kind": "x"}'}),
    "is not Jinja": forged(
        fields={
            "template": json.dumps(
                {"messages": [{"role": "user", "content": "{prompt}{query}"}], "chat_template": "{% for %}"}
            )
        }
    ),
    "is not a readable safetensors file": b"\x80\x04\x95pickle",
    "not a readable": (2**62).to_bytes(8, "little") + b"{}",
    "not a prompt file of": (2).to_bytes(8, "little") + b"{}",
    "is empty": b"",
    "match its checksum": DATA.replace(b"tau", b"tao"),
}


@pytest.mark.parametrize("said", sorted(HOSTILE))
def test_hostile_files_are_refused(tmp_path: Path, said: str) -> None:
    with pytest.raises(PromptError, match=said.strip()) as raised:
        load_bytes(tmp_path, HOSTILE[said])
    assert "\n" not in str(raised.value)


def test_forging_without_a_change_is_accepted(tmp_path: Path) -> None:
    assert equal(load_bytes(tmp_path, forged()), tuned())


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="there is no prompt file"):
        SoftPrompt.load(tmp_path / "absent")
    with pytest.raises(PromptError, match="is not a file"):
        SoftPrompt.load(tmp_path)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    tuned().save(tmp_path / "p")
    with pytest.raises(PromptError, match="made for the model fake, whose embedding rows are not those of other"):
        SoftPrompt.load(tmp_path / "p", fake_model("chatml", seed=2, name="other"))


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "p"
    tuned().save(path)
    before = path.read_bytes()
    with pytest.raises(PromptError, match="metadata must be JSON"):
        tuned().replace(metadata={"x": object()}).save(path)
    with pytest.raises(SaveError):
        tuned().save(tmp_path / "absent" / "p")
    with pytest.raises(PromptError, match=r"not saved to .* not finite"):
        tuned().replace(embeddings=tuned().embeddings * float("nan")).save(path)
    assert path.read_bytes() == before


def test_numbers_that_are_not_finite_may_stand_in_the_metadata(tmp_path: Path) -> None:
    tuned().replace(metadata={"loss": float("nan")}).save(tmp_path / "p")
    assert SoftPrompt.load(tmp_path / "p").metadata["loss"] != SoftPrompt.load(tmp_path / "p").metadata["loss"]


def test_a_model_needs_nothing_else() -> None:
    assert isinstance(MODEL, FakeModel)
    assert not hasattr(MODEL, "decoder")
