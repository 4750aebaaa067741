"""PEFT adapters in both directions, and requests to vLLM."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedgrad.exports.check.ours import engine, next_logits
from embedgrad.exports.export import export
from embedgrad.exports.import_peft import import_prompt
from embedgrad.exports.send_to_vllm import chat, completion, embeddings, mixed
from embedgrad.exports.source import Source
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import render_query
from embedgrad.util.errors import ConfigError, ExportError, PromptError
from tests.exports.shared import TEMPLATES, tiny_folder, tuned
from tests.model.tiny import FAMILIES

drawn = settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@drawn
@given(
    place=st.sampled_from(["system", "user before", "few-shot", "dated", "text"]),
    tied=st.booleans(),
)
def test_peft_gives_our_logits(family: str, place: str, tied: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        model = tiny_folder(Path(name) / "m", family, tie_word_embeddings=tied)
        report = export(tuned(model, TEMPLATES[place]), to="peft", model=model, out=Path(name) / "out", check=True)
        assert report.check is not None
        assert report.check.difference < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_the_adapters_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of README.md give PEFT the ids of our rendering."""
    model = tiny_folder(tmp_path / "m")
    prompt = tuned(model, TEMPLATES["user before"])
    export(prompt, to="peft", model=model, out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    code = "\n".join(line[4:] for line in card.splitlines() if line.startswith("    "))
    code = code.replace("PATH", str(tmp_path / "out"))
    known: dict[str, Any] = {"query": "a great film"}
    exec(code, known)
    rendered = render_query(Source.open(model), prompt, "a great film")
    assert rendered.ids[len(rendered.ids) - len(known["ids"]) :] == known["ids"]
    assert len(known["ids"]) < len(rendered.ids) - len(prompt.token_ids)
    assert known["answer"].shape[1] > 0


def test_peft_cannot_hold_a_prompt_behind_the_query_or_several(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "m")
    for place in ("user after", "twice"):
        with pytest.raises(ExportError, match="PEFT can only put it in front"):
            export(tuned(model, TEMPLATES[place]), to="peft", model=model, out=tmp_path / "out")
    with pytest.raises(ExportError, match="holds one prompt, not 2"):
        export({"a": tuned(model), "b": tuned(model)}, to="peft", model=model, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [None, "Is the review good or bad?"])
def test_an_adapter_of_peft_is_read_and_computes_the_same(tmp_path: Path, text: str | None) -> None:
    """An imported prompt in front of the conversation gives the logits that PEFT gives for one query."""
    model = tiny_folder(tmp_path / "m")
    source = Source.open(model)
    count = 5 if text is None else len(source.tokenizer.encode(text))
    init: dict[str, Any] = {"prompt_tuning_init": "RANDOM"}
    if text is not None:
        init = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text, "tokenizer_name_or_path": str(model)}
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    config = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=count, **init)
    tuned_model: Any = peft.get_peft_model(base, config).eval()
    tuned_model.save_pretrained(tmp_path / "adapter")
    prompt = import_prompt(tmp_path / "adapter", model=model, place="front")
    rendered = render_query(source, prompt, "a film")
    assert rendered.prompt_rows[:count] == list(range(count))
    ids = torch.tensor([rendered.ids[count:]])
    with torch.no_grad():
        theirs = tuned_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    ours = next_logits(engine(source), prompt.embeddings, [rendered])[0]
    assert float((theirs - ours).abs().max()) < 1e-4
    if text is not None:
        assert prompt.token_ids == source.tokenizer.encode(text)
    prompt.save(tmp_path / "prompt.safetensors")
    assert SoftPrompt.load(tmp_path / "prompt.safetensors", source).metadata["imported"]["adapter"] == "adapter"
    inside = import_prompt(tmp_path / "adapter", model=model)
    assert inside.template.messages[0] == ("system", "{prompt}")
    assert torch.equal(inside.embeddings, prompt.embeddings)


def test_adapters_that_hold_no_prompt_are_refused(tmp_path: Path) -> None:
    model, other = tiny_folder(tmp_path / "m"), tiny_folder(tmp_path / "other", hidden_size=32)
    out = tmp_path / "out"
    export(tuned(model), to="peft", model=model, out=out, check=False)
    good = json.loads((out / "adapter_config.json").read_text())
    weights = (out / "adapter_model.safetensors").read_bytes()

    def refused(
        words: str, config: Any = good, data: bytes | None = weights, base: Path = model, **options: Any
    ) -> None:
        (out / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        (out / "adapter_model.safetensors").unlink(missing_ok=True)
        if data is not None:
            (out / "adapter_model.safetensors").write_bytes(data)
        with pytest.raises((PromptError, ConfigError), match=words):
            import_prompt(out, model=base, **options)

    refused("type 'LORA'; only PROMPT_TUNING", {**good, "peft_type": "LORA"})
    refused("is not readable JSON", "{")
    refused("not a complete safetensors file", data=weights[: len(weights) // 2])
    refused("has 29 rows, and its adapter_config.json says 7", {**good, "num_virtual_tokens": 7})
    refused("has hidden size 32", base=other)
    refused("there is no place 'behind'", place="behind")
    (out / "adapter_model.bin").touch()
    refused("pickled adapter_model.bin is not read", data=None)
    with pytest.raises(PromptError, match="is no PEFT adapter"):
        import_prompt(model, model=model)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@drawn
@given(place=st.sampled_from(sorted(TEMPLATES)))
def test_vllms_requests_hold_our_sequence(family: str, place: str) -> None:
    """vLLM's Gemma 3 takes embeddings that are multiplied already; its Gemma 2 and Granite multiply what they take."""
    with tempfile.TemporaryDirectory() as name:
        model = tiny_folder(Path(name) / "m", family)
        prompt = tuned(model, TEMPLATES[place])
        export({"a": prompt}, to="vllm", model=model, out=Path(name) / "out")
        content = json.loads((Path(name) / "out" / "a.json").read_text())
        source, tokenizer = Source.open(model), transformers.AutoTokenizer.from_pretrained(model)
        rendered = render_query(source, prompt, "what a bore")
        scale = 64**0.5 if family == "gemma3_text" else 1.0
        assert torch.equal(embeddings(content), prompt.embeddings * scale)
        shown = mixed(content, tokenizer, "what a bore")
        assert shown["prompt_token_ids"] == rendered.ids
        rows = torch.tensor(rendered.prompt_rows)
        assert shown["prompt_is_token_ids"] == (rows < 0).tolist()
        assert torch.equal(shown["prompt_embeds"][rows >= 0], scale * prompt.embeddings[rows[rows >= 0]])
        body = completion(content, tokenizer, source.table, "what a bore", max_tokens=3)
        whole = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        wanted = source.embedding_rows(rendered.ids)
        wanted[rows >= 0] = prompt.embeddings[rows[rows >= 0]]
        assert torch.equal(whole, scale * wanted)
        assert body["max_tokens"] == 3
        if place == "system":
            part = chat(content, "what a bore")["messages"][0]["content"][0]
            assert part["type"] == "prompt_embeds"
        else:
            with pytest.raises(SystemExit, match="use a completion"):
                chat(content, "what a bore")


class _Server(BaseHTTPRequestHandler):
    bodies: list[dict[str, Any]] = []  # noqa: RUF012 (one server at a time)

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        answer = json.dumps({"choices": [{"message": {"content": "fine"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


def test_the_program_beside_the_requests_stands_alone(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "m")
    export({"a": tuned(model)}, to="vllm", model=model, out=tmp_path / "out")
    server = HTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [sys.executable, "send_to_vllm.py", "a.json", f"http://127.0.0.1:{server.server_port}", "a {query} film"]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, env={"PATH": ""})
    server.shutdown()
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
    assert _Server.bodies[0]["messages"][1] == {"role": "user", "content": "a {query} film"}
    assert "embedgrad" not in (tmp_path / "out" / "send_to_vllm.py").read_text().replace("embedgrad tuned", "")
