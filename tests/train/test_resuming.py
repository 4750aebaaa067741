"""What a resumed run keeps: the date, the chat template, the machine; and how it is given more steps."""

from __future__ import annotations

import datetime
import json
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.engine.model import Model, load_model
from embedgrad.prompt import sandbox
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.template import Template
from embedgrad.train import resuming
from embedgrad.train.checkpoints import identity
from embedgrad.train.optimize import OptimizeResult, optimize
from embedgrad.util.errors import ConfigError
from tests.model.tiny import CHAT_TEMPLATE, write_folder
from tests.train.test_resume import StopAt
from tests.train.training import TRAIN, VALIDATION, quick_config

DATED = "Today: {{ strftime_now('%A, %d %b %Y') }}\n" + CHAT_TEMPLATE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "m")
    chat_template(tmp_path / "m", DATED)
    return tmp_path / "m"


def chat_template(folder: Path, source: str) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": source}))


def on(day: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the clock to a day of January 2026."""

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Fixed:
            return cls(2026, 1, day, 13, 14)

    monkeypatch.setattr(sandbox, "datetime", types.SimpleNamespace(datetime=Fixed))
    sandbox.compile_chat_template.cache_clear()


def start(folder: Path, **variables: str) -> tuple[Model, SoftPrompt]:
    messages = [{"role": "system", "content": "{prompt}"}, {"role": "user", "content": "{query}"}]
    model = load_model(folder)
    return model, SoftPrompt.from_text(model, "Say it.", Template.chat(messages, variables=variables))


def run(
    begun: tuple[Model, SoftPrompt], path: Path, stop_at: int = 0, progress: StopAt | None = None, **options: Any
) -> OptimizeResult:
    given = {"config": quick_config(), "resume": "auto", **options}
    return optimize(*begun, TRAIN, VALIDATION, run_dir=path, progress=progress or StopAt(stop_at), **given)


def test_a_run_keeps_the_date_on_which_it_began(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(30, monkeypatch)
    whole = run(start(folder), tmp_path / "whole")
    run(start(folder), tmp_path / "two", stop_at=3)
    on(31, monkeypatch)
    progress = StopAt(0)
    again = run(start(folder), tmp_path / "two", progress=progress)
    assert torch.equal(again.prompt.embeddings, whole.prompt.embeddings)
    assert again.prompt.template.date == "2026-01-30"
    assert any("2026-01-30, the day on which the run began" in note for note in progress.notes)
    with pytest.raises(ConfigError, match="the prompt's template"):
        run(start(folder, strftime_now="2025-12-24"), tmp_path / "two")


def test_a_saved_prompt_keeps_its_header(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    on(30, monkeypatch)
    model, prompt = start(folder)
    prompt.save(tmp_path / "p.safetensors")
    on(31, monkeypatch)
    model = load_model(folder)
    loaded = SoftPrompt.load(tmp_path / "p.safetensors", model)
    assert "Friday, 30 Jan 2026" in model.tokenizer.decode([id for id in loaded.layout_ids if id >= 0])
    assert loaded.behind(model, loaded.template).layout_ids == loaded.layout_ids
    assert not recwarn.list


@pytest.mark.parametrize("source", [CHAT_TEMPLATE + " ", CHAT_TEMPLATE.replace("'\n'", "'\n\n'"), "Hi. " + DATED])
def test_a_changed_chat_template_ends_a_run(folder: Path, tmp_path: Path, source: str) -> None:
    """The template is the model's, and so no part of the prompt; its tokens are part of the run."""
    chat_template(folder, CHAT_TEMPLATE)
    run(start(folder), tmp_path / "run", stop_at=2)
    chat_template(folder, source)
    with pytest.raises(ConfigError, match=r"tokens of the data \(tokenizer, chat template\)|the prompt's template"):
        run(start(folder), tmp_path / "run")


COMPUTATIONS = {"threads": 3, "backend": "reference", "device": "another", "vector instructions": "NONE", "torch": "1"}


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_another_machine_is_said(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = start(folder)
    run(begun, tmp_path / "run", stop_at=2)
    here = resuming.computation(begun[0])
    monkeypatch.setattr("embedgrad.train.session.computation", lambda *_: {**here, name: COMPUTATIONS[name]})
    said = rf"the computation's {name} \({here[name]}, now {COMPUTATIONS[name]}\)"
    with pytest.raises(ConfigError, match=f"{said}.*--allow-other-bits".replace("+", r"\+")):
        run(begun, tmp_path / "run")
    progress = StopAt(4)
    run(begun, tmp_path / "run", progress=progress, allow_other_bits=True)
    assert len([note for note in progress.notes if "other bits" in note]) == 1
    finished = run(begun, tmp_path / "run")  # the run's identity is that of the machine on which it goes on
    assert finished.stop_reason == "completed"
    monkeypatch.undo()
    assert run(begun, tmp_path / "run").steps == 7  # nothing is computed any more


def test_the_real_backend_counts(folder: Path, tmp_path: Path) -> None:
    run(start(folder), tmp_path / "run", stop_at=2)
    reference = load_model(folder, backend="reference")
    with pytest.raises(ConfigError, match=r"backend \(native, now reference\)"):
        run((reference, start(folder)[1]), tmp_path / "run")


@settings(max_examples=8, deadline=None)
@given(first=st.integers(1, 6), stop=st.integers(0, 6), more=st.integers(1, 5))
def test_more_steps_are_those_of_a_longer_run(
    tmp_path_factory: pytest.TempPathFactory, first: int, stop: int, more: int
) -> None:
    """With a constant rate, completed or interrupted."""
    tmp_path = tmp_path_factory.mktemp("more")
    write_folder(tmp_path / "m")
    begun = start(tmp_path / "m")
    plain = {"schedule": "constant", "validate_every": 1}
    whole = run(begun, tmp_path / "whole", config=quick_config(steps=first + more, **plain))
    run(begun, tmp_path / "run", stop_at=min(stop, first), config=quick_config(steps=first, **plain))
    progress = StopAt(0)
    again = run(begun, tmp_path / "run", progress=progress, config=quick_config(steps=first + more, **plain))
    assert again.steps == first + more
    assert torch.equal(again.last_prompt.embeddings, whole.last_prompt.embeddings)
    assert torch.equal(again.prompt.embeddings, whole.prompt.embeddings)
    assert any(f"goes on to {first + more} steps" in note for note in progress.notes)


def test_fewer_steps_than_were_taken(folder: Path, tmp_path: Path) -> None:
    run(start(folder), tmp_path / "run", stop_at=4)
    with pytest.raises(ConfigError, match="has taken 4 steps, and the settings now ask for 3"):
        run(start(folder), tmp_path / "run", config=quick_config(steps=3))
    assert run(start(folder), tmp_path / "run", config=quick_config(steps=5)).steps == 5


def test_more_steps_do_not_undo_early_stopping(folder: Path, tmp_path: Path) -> None:
    stopping = {"patience": 1, "validate_every": 1, "learning_rate": 1e-9, "trust_region": {"tau": 1.0}}
    first = run(start(folder), tmp_path / "run", config=quick_config(**stopping))
    assert first.stop_reason == "early stopping"
    progress = StopAt(0)
    config = quick_config(steps=20, **stopping)
    assert run(start(folder), tmp_path / "run", config=config, progress=progress).steps == first.steps
    assert any("has ended (early stopping)" in note for note in progress.notes)


def test_checkpoints_of_earlier_versions_are_resumed(folder: Path, tmp_path: Path) -> None:
    """Their identity has neither tokens nor computation."""
    begun = start(folder)
    whole = run(begun, tmp_path / "whole")

    def older(*parts: Any) -> dict[str, Any]:
        found = identity(*parts)
        return {part: found[part] for part in list(found)[:5]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embedgrad.train.session.identity", older)
        run(begun, tmp_path / "run", stop_at=3)
    assert torch.equal(run(begun, tmp_path / "run").prompt.embeddings, whole.prompt.embeddings)
    shutil.rmtree(tmp_path / "run")
