"""The folder for transformers, vLLM, SGLang and MLX."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import embedgrad
from embedgrad.exports.check.report import CheckReport
from embedgrad.exports.export import export
from embedgrad.exports.source import Source
from embedgrad.generation.generate import generate
from embedgrad.generation.sampling import Sampling
from embedgrad.prompt.rendering import render_query
from embedgrad.util.errors import ConfigError, ExportError, PromptError, SaveError
from tests.exports.shared import TEMPLATES, tiny_folder, tuned
from tests.model.tiny import EXTRA, FAMILIES, SMALL, STYLE_OF, write_gguf, write_tokenizer

drawn = settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@drawn
@given(
    tied=st.booleans(),
    untie=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shards=st.sampled_from([None, 20_000]),
    places=st.lists(st.sampled_from(sorted(TEMPLATES)), min_size=1, max_size=3),
    spare=st.sampled_from([400, 405, 440]),
)
def test_transformers_reads_the_copy_as_our_engine_reads_the_prompt(
    family: str, tied: bool, untie: bool, dtype: torch.dtype, shards: int | None, places: list[str], spare: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        model = tiny_folder(
            Path(name) / "model", family, tie_word_embeddings=tied, dtype=dtype, shard_bytes=shards, vocab_size=spare
        )
        prompts = {f"p{i}": tuned(model, TEMPLATES[place], seed=i) for i, place in enumerate(places)}
        report = export(prompts, to="hf", model=model, out=Path(name) / "copy", untie=untie, check=True)
        assert isinstance(report.check, CheckReport)
        assert report.check.conversations == 3 * len(places)
        assert report.check.difference <= (1e-3 if dtype == torch.float32 else 0.2)
        assert report.facts["rows"] == max(spare, 400 + report.facts["new tokens"])


def test_answers_of_the_copy_are_the_prompts_answers(tmp_path: Path) -> None:
    """Greedy answers by transformers, with suppressed tokens, and by our own engine on the copy as plain text."""
    model = tiny_folder(tmp_path / "model", "qwen2", tie_word_embeddings=True, vocab_size=400)
    prompt = tuned(model)
    report = export(prompt, to="hf", model=model, out=tmp_path / "copy", names=["reviews"])
    queries = ["a great film", "what a bore", "It's 1234567 times better"]
    ours = generate(embedgrad.load_model(model), prompt, queries, Sampling(max_new_tokens=8))
    tokenizer = transformers.AutoTokenizer.from_pretrained(report.path)
    copy: Any = transformers.AutoModelForCausalLM.from_pretrained(report.path).eval()
    for query, answer in zip(queries, ours, strict=True):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": query}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = copy.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
        new = out[0, inputs["input_ids"].shape[1] :].tolist()
        assert new[: len(answer.ids)] == answer.ids
    loaded = embedgrad.load_model(report.path)
    bias = {id: -float("inf") for id in range(400, 400 + len(prompt.token_ids))}
    text = "".join(f"<|reviews_{i}|>" for i in range(len(prompt.token_ids)))
    turns = [{"role": "system", "content": "{prompt}"}, {"role": "user", "content": "{query}"}]
    template = embedgrad.Template.chat(turns, control_tokens=True)
    plain = embedgrad.SoftPrompt.from_text(loaded, text, template=template)
    again = generate(loaded, plain, queries, Sampling(max_new_tokens=8, logit_bias=bias))
    assert [a.ids for a in again] == [a.ids for a in ours]


def test_a_prompt_is_chosen_by_name_and_a_system_message_of_the_caller_stays(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    prompts = {"a": tuned(model), "b": tuned(model, TEMPLATES["user after"])}
    export(prompts, to="hf", model=model, out=tmp_path / "copy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    plain = transformers.AutoTokenizer.from_pretrained(model)
    a, b = ("".join(f"<|{name}_{i}|>" for i in range(len(p.token_ids))) for name, p in prompts.items())
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]

    def text(messages: list[dict[str, str]], own: Any = tokenizer, **options: Any) -> str:
        return str(own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))

    system = {"role": "system", "content": "Be kind."}
    assert text(turns) == text([{"role": "system", "content": a}, *turns], plain)
    assert text([system, *turns]) == text([system, *turns], plain)
    assert text(turns, embedgrad_prompt="none") == text(turns, plain)
    changed = [{**turn, "content": f"{turn['content']}\n\n{b}"} if turn["role"] == "user" else turn for turn in turns]
    assert text([system, *turns], embedgrad_prompt="b") == text([system, *changed], plain)
    with pytest.raises(Exception, match="embedgrad_prompt must be one of a, b, none"):
        text(turns, embedgrad_prompt="c")
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "| a |" in card
    assert "| b |" in card


def test_unchanged_files_are_links_and_the_configuration_keeps_its_fields(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", shard_bytes=20_000, vocab_size=400)
    old = json.loads((model / "config.json").read_text())
    theta = old.pop("rope_parameters")["rope_theta"]
    old |= {"rope_theta": theta, "_name_or_path": "somewhere"}
    (model / "config.json").write_text(json.dumps(old))
    (model / "LICENSE").write_text("free")
    (model / "pytorch_model.bin").write_text("a pickle")
    export(tuned(model), to="hf", model=model, out=tmp_path / "copy", check=False)
    copy = tmp_path / "copy"
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    linked = [name for name in shards if (copy / name).stat().st_ino == (model / name).stat().st_ino]
    assert len(shards) - len(linked) == 2  # the embedding's and the head's
    new = json.loads((copy / "config.json").read_text())
    assert {name: value for name, value in new.items() if old.get(name) != value} == {"vocab_size": 415}
    assert (copy / "LICENSE").read_text() == "free"
    assert not (copy / "pytorch_model.bin").exists()
    assert sorted(json.loads((copy / "generation_config.json").read_text())["suppress_tokens"]) == [*range(400, 415)]


def test_tokens_that_only_tokenizer_config_declares_keep_their_ids(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", vocab_size=404)
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"] = {"400": {"content": "<think>", "special": False}}
    path.write_text(json.dumps(config))
    report = export(tuned(model), to="hf", model=model, out=tmp_path / "copy", check=True)
    tokenizer = embedgrad.load_model(report.path).tokenizer
    assert tokenizer.encode("<think>") == [400]
    assert tokenizer.token(401) == "<|prompt_0|>"


def test_a_gguf_file_becomes_a_folder(tmp_path: Path) -> None:
    twin = tiny_folder(tmp_path / "model", "qwen3", tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(twin)
    write_gguf(tmp_path / "model.gguf", model, kind="Q8_0")
    prompt = tuned(tmp_path / "model.gguf")
    report = export(prompt, to="hf", model=tmp_path / "model.gguf", out=tmp_path / "copy", dtype="bfloat16", check=True)
    assert report.facts["type of the embedding table"] == "bfloat16"
    report = export(prompt, to="hf", model=tmp_path / "model.gguf", out=tmp_path / "copy32", check=True)
    assert report.check is not None
    assert report.check.difference < 1e-4


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "LlamaTokenizer"])
def test_a_sentencepiece_copy_is_read_by_the_class_of_its_family(tmp_path: Path, tokenizer_class: str) -> None:
    model = tiny_folder(tmp_path / "model", "mistral")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": tokenizer_class, "legacy": True}))
    prompts = {"a": tuned(model), "b": tuned(model, TEMPLATES["text"])}
    report = export(prompts, to="hf", model=model, out=tmp_path / "copy", check=True)
    assert report.check is not None
    assert report.check.agreement == 6


def test_other_models_are_refused_and_a_fine_tune_needs_force(tmp_path: Path) -> None:
    model, other = tiny_folder(tmp_path / "model"), tiny_folder(tmp_path / "other", seed=5)
    prompt = tuned(model)
    with pytest.raises(PromptError, match=r"not those of other.*--force takes it"):
        export(prompt, to="hf", model=other, out=tmp_path / "copy")
    with pytest.raises(PromptError, match="is no fine-tune of model: the mean cosine"):
        export(prompt, to="hf", model=other, out=tmp_path / "copy", force=True)
    tune = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        tune.get_input_embeddings().weight.mul_(1.01).add_(0.01)
    tune.save_pretrained(tmp_path / "tune")
    write_tokenizer(tmp_path / "tune")
    with pytest.warns(UserWarning, match="was made for model and is exported for tune"):
        report = export(prompt, to="hf", model=tmp_path / "tune", out=tmp_path / "copy", force=True, check=True)
    assert report.check is not None
    wide = tiny_folder(tmp_path / "wide", hidden_size=32)
    with pytest.raises(PromptError, match="--force cannot change that"):
        export(prompt, to="hf", model=wide, out=tmp_path / "copy2", force=True)


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_folder(tmp_path / "model")
    prompt = tuned(model)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("embedgrad.exports.hf.copy_weights", full)
    with pytest.raises(SaveError, match="No space left on device"):
        export(prompt, to="hf", model=model, out=tmp_path / "copy")
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.undo()
    wrong = render_query(Source.open(model), prompt, "a film")
    monkeypatch.setattr(
        "embedgrad.exports.check.with_transformers.next_logits", lambda *_: torch.zeros(3, 420) + len(wrong.ids)
    )
    with pytest.raises(ExportError, match="gives other logits than embedgrad"):
        export(prompt, to="hf", model=model, out=tmp_path / "copy", check=True)
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.undo()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for out, words in (("full", "exists already"), ("none/copy", "is not a folder")):
        with pytest.raises(SaveError, match=words):
            export(prompt, to="hf", model=model, out=tmp_path / out)


def test_unusable_names_and_targets_are_refused(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    prompt = tuned(model)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"names": ["none"]}, "cannot be a prompt's name"),
        ({"names": ["a b"]}, "cannot be a prompt's name"),
        ({"names": ["a", "b"]}, "1 prompts need as many names, not 2"),
        ({"to": "onnx"}, "there is no target 'onnx'"),
        ({"dtype": "int3"}, "unknown dtype"),
    ]
    for options, words in cases:
        with pytest.raises(ConfigError, match=words):
            export(prompt, **{"to": "hf", "model": model, "out": tmp_path / "copy", **options})
    with pytest.raises(ConfigError, match="two prompts are called 'a'"):
        export([prompt, prompt], to="hf", model=model, out=tmp_path / "copy", names=["a", "a"])
    huge = prompt.replace(embeddings=prompt.embeddings * 1e6)
    half = tiny_folder(tmp_path / "half", dtype=torch.float16)
    with pytest.raises(ExportError, match="too large for the embedding table's type, float16"):
        export(tuned(half).replace(embeddings=huge.embeddings), to="hf", model=half, out=tmp_path / "copy")
    taken = tiny_folder(tmp_path / "taken")
    table = json.loads((taken / "tokenizer.json").read_text())
    table["added_tokens"].append({**table["added_tokens"][0], "id": 400, "content": "<|prompt_0|>"})
    (taken / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ExportError, match=r"has the token <\|prompt_0\|> already"):
        export(tuned(taken), to="hf", model=taken, out=tmp_path / "copy")


@pytest.mark.parametrize("shards", [None, 60_000])
def test_the_text_part_of_a_multimodal_model_becomes_a_model_of_its_own(tmp_path: Path, shards: int | None) -> None:
    """transformers loads it as such, and our engine reads from it what the whole model's text part gives."""
    text = transformers.Gemma3TextConfig(**SMALL, **EXTRA["gemma3_text"])
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_index=399
    )
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    folder, out = tmp_path / "whole", tmp_path / "copy"
    whole.save_pretrained(folder, max_shard_size=shards or "5GB")
    write_tokenizer(folder, STYLE_OF["gemma3_text"])
    report = export(tuned(folder), to="hf", model=folder, out=out, check=True)
    assert report.facts["part of the model"] == "its text part, as a model of its own"
    assert report.check is not None
    copy = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="float32")
    assert type(copy) is transformers.Gemma3ForCausalLM
    ids = torch.tensor([[5, 30, 200, 31, 77, 12, 9, 8]])  # rows from 400 on are the prompt's
    with torch.no_grad():
        expected, found = (model(input_ids=ids).logits[..., :400] for model in (whole, copy))
    torch.testing.assert_close(found, expected)
    held = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert held == {name for name in copy.state_dict() if name != "lm_head.weight"}
