"""The file for llama.cpp, and the Modelfile for Ollama."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedgrad.exports.chat_template import VARIABLE
from embedgrad.exports.export import export
from embedgrad.exports.gguf import read_rows
from embedgrad.exports.gguf_file import stored_rows
from embedgrad.model.checkpoint import read_checkpoint
from embedgrad.model.files.gguf import GgufFile
from embedgrad.model.tokenizer import Tokenizer
from embedgrad.prompt.sandbox import compile_chat_template
from embedgrad.prompt.template import Template
from embedgrad.util.errors import ExportError, SaveError
from tests.exports.shared import IN_GGUF, TEMPLATES, tiny_folder, tuned
from tests.model.tiny import CHAT_TEMPLATE, FAMILIES, write_gguf

_MIXED = ["full_attention", "sliding_attention"]
drawn = settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))


def gguf_of(folder: Path, path: Path, kind: str, **metadata: Any) -> Path:
    write_gguf(path, transformers.AutoModelForCausalLM.from_pretrained(folder), kind=kind, metadata=metadata)
    return path


@pytest.mark.parametrize("family", sorted(FAMILIES))
@drawn
@given(
    tied=st.booleans(),
    untie=st.booleans(),
    kind=st.sampled_from(["folder", "F32", "F16", "Q8_0", "Q4_0", "Q5_0"]),
    places=st.lists(st.sampled_from(sorted(set(TEMPLATES) - {"dated"})), min_size=1, max_size=2),
    spare=st.sampled_from([400, 405, 440]),
)
def test_llama_cpp_reads_the_file_as_our_engine_reads_the_prompt(
    family: str, tied: bool, untie: bool, kind: str, places: list[str], spare: int
) -> None:
    pytest.importorskip("xllamacpp")
    with tempfile.TemporaryDirectory() as name:
        options = {"tie_word_embeddings": tied, **IN_GGUF.get(family, {})}
        untie = untie and family != "gemma2"
        model = tiny_folder(Path(name) / "m", family, vocab_size=spare, **options)
        if kind != "folder":
            model = gguf_of(model, Path(name) / "m.gguf", kind)
        prompts = {f"p{i}": tuned(model, TEMPLATES[place], seed=i) for i, place in enumerate(places)}
        report = export(prompts, to="gguf", model=model, out=Path(name) / "out.gguf", untie=untie, check=True)
        assert report.check is not None
        wide = {"folder": "F32", "Q4_0": "Q8_0, in the model Q4_0", "Q5_0": "Q8_0, in the model Q5_0"}
        assert report.facts["type of the embedding table"] == wide.get(kind, kind)


def test_only_the_table_and_the_vocabulary_change(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", tie_word_embeddings=True)
    model = gguf_of(folder, tmp_path / "m.gguf", "Q8_0", extra_key="kept")
    prompt = tuned(model)
    export(prompt, to="gguf", model=model, out=tmp_path / "out.gguf", check=False)
    old, new = GgufFile(model), GgufFile(tmp_path / "out.gguf")
    changed = {key for key, value in new.pairs().items() if old.pairs().get(key) != value}
    assert changed == {
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.chat_template",
        "tokenizer.ggml.suppress_tokens",
    }
    assert list(new.pairs())[:3] == list(old.pairs())[:3]
    assert new.metadata["extra_key"] == "kept"
    for one, other in zip(old.stored(), new.stored(), strict=True):
        same = one.data[: len(other.data)].equal(other.data)
        assert same == (one.name != "token_embd.weight"), one.name
    ids = new.metadata["tokenizer.ggml.suppress_tokens"].tolist()
    assert ids == list(range(400, 400 + len(prompt.token_ids)))
    table = read_checkpoint(tmp_path / "out.gguf").tensors.get("model.embed_tokens.weight")
    before = read_checkpoint(model).tensors.get("model.embed_tokens.weight")
    assert torch.equal(table[:400], before[:400])
    assert float((table[ids] - prompt.embeddings).norm() / prompt.embeddings.norm()) < 0.008


@drawn
@given(values=st.integers(0, 2**31), scale=st.sampled_from([1e-4, 0.1, 30.0]))
def test_tuned_rows_are_rounded_better_than_the_type_asks(values: int, scale: float) -> None:
    rows = torch.randn(6, 96, generator=torch.Generator().manual_seed(values)) * scale
    rows[0] = 0
    usual = (read_rows(stored_rows(rows, "Q8_0"), "Q8_0") - rows).square().sum()
    best = (read_rows(stored_rows(rows, "Q8_0", exact=True), "Q8_0") - rows).square().sum()
    assert float(best) <= float(usual)
    for kind in ("F32", "F16", "BF16"):
        assert stored_rows(rows, kind).dtype == np.uint8
        assert torch.allclose(read_rows(stored_rows(rows, kind), kind), rows, rtol=1e-2, atol=1e-6)


def test_what_a_file_cannot_say_is_refused(tmp_path: Path) -> None:
    window = tiny_folder(tmp_path / "window", "mistral", sliding_window=16)
    with pytest.raises(ExportError, match="attends to a sliding window"):
        export(tuned(window), to="gguf", model=window, out=tmp_path / "out.gguf")
    odd = tiny_folder(tmp_path / "odd")
    path = odd / "tokenizer.json"
    path.write_text(path.read_text().replace('"individual_digits":true', '"individual_digits":false'))
    with pytest.raises(ExportError, match="knows no name of llama"):
        export(tuned(odd), to="gguf", model=odd, out=tmp_path / "out.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SaveError, match="exists already"):
        export(tuned(odd), to="gguf", model=odd, out=tmp_path / "empty")
    assert not (tmp_path / "out.gguf").exists()


def go(template: str, messages: list[dict[str, str]]) -> str:
    """Runs a Modelfile's template: a loop over the messages with a branch for each role."""
    found = re.fullmatch(r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.S)
    assert found is not None
    begin, loop, ask = found.groups()
    pieces = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', loop)
    branches = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    turns = (branches[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages)
    return begin + "".join(turns) + ask


@pytest.mark.parametrize("place", ["system", "user before", "user after", "few-shot"])
def test_the_modelfile_writes_the_same_conversations(tmp_path: Path, place: str) -> None:
    default = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    model = tiny_folder(tmp_path / "m")
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": default + CHAT_TEMPLATE}))
    export({"a": tuned(model, TEMPLATES[place])}, to="ollama", model=model, out=tmp_path / "out", check=False)
    text = (tmp_path / "out" / "Modelfile").read_text()
    lines = dict(re.findall(r'^(TEMPLATE|SYSTEM) """(.*?)"""$', text, re.S | re.M))
    shots = re.findall(r'^MESSAGE (\w+) """(.*?)"""$', text, re.M)
    told = [{"role": role, "content": content} for role, content in shots]
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    tokenizer = Tokenizer.from_gguf(GgufFile(tmp_path / "out" / "model.gguf").metadata)
    wanted = compile_chat_template(str(tokenizer.chat_template)).render(
        turns, tokenizer.special, add_generation_prompt=True, variables={VARIABLE: "a"}
    )
    assert go(lines["TEMPLATE"], [{"role": "system", "content": lines["SYSTEM"]}, *told, *turns]) == wanted
    assert text.startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop """<|im_end|>"""' in text


def test_templates_beyond_ollamas_are_refused(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "m")
    counted = CHAT_TEMPLATE.replace("{% for message in", "{{ messages|length }}{% for message in")
    messages = [{"role": "user", "content": "{prompt} {query}"}]
    cases = [
        (Template.chat(messages, chat_template=counted), "more than to write one turn after the other"),
        (Template.chat([{"role": "user", "content": "{{x}} {prompt} {query}"}]), "beside braces"),
        (Template.chat([{"role": "user", "content": '""" {prompt} {query}'}]), 'beside """'),
        (Template.chat([*messages, {"role": "system", "content": "now"}]), "messages after the query"),
    ]
    for template, words in cases:
        with pytest.raises(ExportError, match=words):
            export(tuned(model, template), to="ollama", model=model, out=tmp_path / "out", check=False)


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("gemma2", {"query_pre_attn_scalar": 9}, "query_scale"),
        ("gemma2", {"query_pre_attn_scalar": 16, "tie_word_embeddings": False}, "matrix of its own"),
        ("olmo2", {"tie_word_embeddings": True}, "shares the embedding table"),
        ("smollm3", {"no_rope_layers": [0, 1]}, "unrotated"),
        ("gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": _MIXED}, "windows"),
        ("phi3", {"sliding_window": 7}, "sliding window"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, family: str, options: dict[str, Any], named: str
) -> None:
    model = tiny_folder(tmp_path / "m", family, **options)
    with pytest.raises(ExportError, match=named):
        export(tuned(model), to="gguf", model=model, out=tmp_path / "out.gguf", check=False)
    assert not (tmp_path / "out.gguf").exists()
