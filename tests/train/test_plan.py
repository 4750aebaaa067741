"""From a configuration to a start: saved prompts, settings of chat templates, dates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from embedgrad.cli.commands.optimize import run
from embedgrad.compare.runner import Runner
from embedgrad.engine.model import load_model
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.template import Template
from embedgrad.train.plan import Plan, plan
from embedgrad.train.settings import load_run_config
from embedgrad.util.errors import ConfigError, PromptError, TemplateError
from tests.model.tiny import CHAT_TEMPLATE, write_folder

THINKS = "{% if enable_thinking is defined %}thinking: {{ enable_thinking }}\n{% endif %}" + CHAT_TEMPLATE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "m")
    rows = [{"query": f"a film, number {i}", "target": ["good", "bad"][i % 2]} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def chat_template(folder: Path, source: str) -> None:
    path = folder / "m" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": source}))


def planned(folder: Path, **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "model": "m", "prompt": "Say it.", "run": {"folder": "runs"},
        "data": {"path": "data.jsonl", "split": {"train": 8, "validation": 4, "test": 4}},
        "optimize": {"steps": 2, "batch_size": 4, "trust_region": {"tau": 0.9}},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values | changes))
    return plan(load_run_config(folder / "run.yaml"))


@pytest.mark.parametrize("suffix", [".safetensors", ".SafeTensors"])
def test_a_run_starts_from_a_saved_prompt(folder: Path, suffix: str) -> None:
    model = load_model(folder / "m")
    planned(folder)
    assert run(folder / "run.yaml", [], None, False, True, False) == 0
    first = SoftPrompt.load(folder / "runs" / "run" / "last.safetensors", model)
    first.save(folder / f"first{suffix}")
    again = planned(folder, prompt={"file": f"first{suffix}"}, run={"folder": "runs", "name": "more"})
    begun = again.start(model)
    assert again.prompt == "Say it."
    assert torch.equal(begun.embeddings, first.embeddings)
    assert torch.equal(begun.anchor, first.anchor)
    assert not torch.equal(begun.embeddings, begun.anchor)
    assert run(folder / "run.yaml", [], None, False, True, False) == 0
    last = SoftPrompt.load(folder / "runs" / "more" / "last.safetensors", model)
    assert not torch.equal(last.embeddings, first.embeddings)
    assert torch.equal(last.anchor, first.anchor)


def test_a_saved_prompt_in_another_template(folder: Path) -> None:
    model = load_model(folder / "m")
    SoftPrompt.from_text(model, "Say it.", Template.plain()).save(folder / "p.safetensors")
    assert planned(folder, prompt={"file": "p.safetensors"}).start(model).template == Template.plain()
    text = {"kind": "text", "text": "{prompt} {query}:"}
    begun = planned(folder, prompt={"file": "p.safetensors"}, template=text).start(model)
    assert begun.template == Template.text("{prompt} {query}:")
    assert begun.layout_ids == begun.behind(model, begun.template).layout_ids


def test_a_saved_prompt_of_another_model_or_none(folder: Path) -> None:
    write_folder(folder / "other", seed=3)
    SoftPrompt.from_text(load_model(folder / "other"), "Say it.").save(folder / "p.safetensors")
    found = planned(folder, prompt={"file": "p.safetensors"})
    with pytest.raises(PromptError, match="was made for the model other"):
        found.start(load_model(folder / "m"))
    (folder / "p.safetensors").write_bytes(b"nothing")
    with pytest.raises(PromptError, match=r"p\.safetensors is not a readable safetensors file"):
        planned(folder, prompt={"file": "p.safetensors"})
    with pytest.raises(PromptError, match="there is no prompt file"):
        planned(folder, prompt={"file": "q.safetensors"})


@pytest.mark.parametrize(
    "template",
    [{"enable_thinking": False}, {"variables": {"enable_thinking": False}}, {"kind": "chat", "enable_thinking": False}],
)
def test_settings_of_the_chat_template_alone(folder: Path, template: dict[str, Any]) -> None:
    """The messages are the model's default, also for the controls of a comparison."""
    chat_template(folder, THINKS)
    model = load_model(folder / "m")
    begun = planned(folder, template=template).start(model)
    told = model.tokenizer.decode([id for id in begun.layout_ids if id >= 0])
    assert told.startswith("thinking: False")
    assert begun.template.messages == SoftPrompt.from_text(model, "Say it.").template.messages
    again = load_run_config(folder / "run.yaml")
    assert again.template is not None
    assert Template.from_json(again.template.to_json()) == again.template


def test_settings_beside_messages(folder: Path) -> None:
    chat_template(folder, THINKS)
    messages = [{"role": "user", "content": "{query} {prompt}"}]
    begun = planned(folder, template={"messages": messages, "enable_thinking": True}).start(load_model(folder / "m"))
    assert begun.template == Template.chat(messages, variables={"enable_thinking": True})


def test_settings_without_a_chat_template(folder: Path) -> None:
    path = folder / "m" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": None}))
    found = planned(folder, template={"enable_thinking": False})
    with pytest.raises(TemplateError, match="there is neither one nor messages"):
        found.start(load_model(folder / "m"))


@pytest.mark.parametrize("slot", ["{{query}}", "{{ query }}", "{{prompt}}", "{{\tprompt}}"])
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_doubled_braces(folder: Path, slot: str, kind: str) -> None:
    body = "{prompt} {query} " + slot
    template = {"kind": "text", "text": body} if kind == "text" else {"messages": [{"role": "user", "content": body}]}
    with pytest.raises(ConfigError, match=r"whose outer braces would stay as text; write \{(query|prompt)\}"):
        planned(folder, template=template)


def test_a_comparison_keeps_its_date(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat_template(folder, "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE)
    model, found = load_model(folder / "m"), planned(folder)
    monkeypatch.setattr("embedgrad.prompt.conversation.today", lambda: "2026-01-30")
    assert Runner(found, model, folder / "c").plan.start(model).template.date == "2026-01-30"
    monkeypatch.setattr("embedgrad.prompt.conversation.today", lambda: "2026-01-31")
    assert Runner(found, model, folder / "c").plan.start(model).template.date == "2026-01-30"
    assert found.start(model).template.date == "2026-01-31"
