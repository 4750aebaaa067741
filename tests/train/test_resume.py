"""Stopping, killing, damaging and resuming: the end is the same bits, or a sentence says why it cannot be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from embedgrad.data.example import Example
from embedgrad.engine.model import load_model
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.template import Template
from embedgrad.train.checkpoints import RunState, _checksum, checkpoints, load_latest, load_state, save_state
from embedgrad.train.optimize import OptimizeResult, optimize
from embedgrad.train.progress import Quiet
from embedgrad.train.run_folder import RunFolder
from embedgrad.util.errors import ConfigError
from tests.model.tiny import write_folder
from tests.train.training import TRAIN, VALIDATION, model_folder, outcome, quick_config, start_prompt, tiny_model


def write_forged(path: Path, state: RunState) -> None:
    """Writes `state` as it is, with a right checksum, under the name of another step."""
    tensors = {name: getattr(state, name) for name in ("e", "m", "v", "best")}
    record = {one.name: getattr(state, one.name) for one in fields(state) if one.name not in tensors}
    text = json.dumps({"format": 1, **record})
    path.write_bytes(save(tensors, metadata={"state": text, "sha256": _checksum(text, tensors)}))


class StopAt(Quiet):
    """Sends Ctrl-C after a step, and records the notes."""

    def __init__(self, step: int) -> None:
        self.at = step
        self.notes: list[str] = []
        self.done = -1

    def start(self, total: int, done: int) -> None:
        self.done = done

    def step(self, record: Mapping[str, Any]) -> None:
        if record["step"] == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(folder: Path, stop_at: int = 0, **options: Any) -> OptimizeResult:
    """The test run, perhaps interrupted, perhaps resumed."""
    model = tiny_model()
    given = {"prompt": start_prompt(model), "train": TRAIN, "validation": VALIDATION, "config": quick_config()}
    given |= {"progress": StopAt(stop_at), "resume": "auto"} | options
    return optimize(model, run_dir=folder, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[OptimizeResult, dict[str, Any], Path]:
    """An undisturbed run: its result, its folder's content, and the folder."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = run(folder)
    return result, outcome(folder), folder


def same_history(one: OptimizeResult, other: OptimizeResult) -> bool:
    """Equal records, times aside."""
    times = {"seconds", "tokens_per_second"}
    pairs = zip(one.history + one.validations, other.history + other.validations, strict=True)
    return all(
        {k: v for k, v in a.items() if k not in times} == {k: b[k] for k in b if k not in times} for a, b in pairs
    )


@pytest.mark.parametrize("step", [1, 2, 3, 6, 7])
def test_interrupted_and_resumed_is_the_same_run(
    step: int, tmp_path: Path, whole: tuple[OptimizeResult, dict[str, Any], Path]
) -> None:
    first = run(tmp_path / "run", stop_at=step)
    assert first.steps == step
    second = run(tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == whole[1]
    assert second.stop_reason == whole[0].stop_reason == "completed"
    assert same_history(second, whole[0])
    assert torch.equal(second.prompt.embeddings, whole[0].prompt.embeddings)


def test_interrupted_at_every_step(tmp_path: Path, whole: tuple[OptimizeResult, dict[str, Any], Path]) -> None:
    for step in range(1, 8):
        run(tmp_path / "run", stop_at=step)
    run(tmp_path / "run")
    assert outcome(tmp_path / "run") == whole[1]


def test_interrupted_in_a_validation(tmp_path: Path, whole: tuple[OptimizeResult, dict[str, Any], Path]) -> None:
    """Step 3 is validated; the request comes with the step, so the validation is left to the resumed run."""
    first = run(tmp_path / "run", stop_at=3)
    assert [record["step"] for record in first.validations] == [0]
    assert [record["step"] for record in run(tmp_path / "run").validations] == [0, 3, 6, 7]


def test_resuming_a_finished_run_gives_its_result(whole: tuple[OptimizeResult, dict[str, Any], Path]) -> None:
    progress = StopAt(0)
    again = run(whole[2], resume=True, progress=progress)
    assert progress.done == 7
    assert same_history(again, whole[0])
    assert torch.equal(again.prompt.embeddings, whole[0].prompt.embeddings)
    assert outcome(whole[2]) == whole[1]


def test_without_validation_data(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", validation=None)
    run(tmp_path / "broken", validation=None, stop_at=5)
    resumed = run(tmp_path / "broken", validation=None)
    assert torch.equal(straight.prompt.embeddings, resumed.prompt.embeddings)
    assert outcome(tmp_path / "straight") == outcome(tmp_path / "broken")


def test_early_stopping_is_remembered(tmp_path: Path) -> None:
    config = quick_config(steps=30, patience=1, validate_every=1, learning_rate=0.5, schedule="constant")
    straight = run(tmp_path / "straight", config=config)
    assert straight.stop_reason == "early stopping"
    run(tmp_path / "broken", config=config, stop_at=straight.steps - 1)
    run(tmp_path / "broken", config=config)
    again = run(tmp_path / "broken", config=config)
    assert again.stop_reason == "early stopping"
    assert outcome(tmp_path / "straight") == outcome(tmp_path / "broken")


@pytest.mark.parametrize(
    ("first", "last", "stride"),
    [(1, 10_000, 17), pytest.param(2, 10_000, 1, marks=pytest.mark.slow)],
)
def test_killed_at_any_moment(first: int, last: int, stride: int, tmp_path: Path) -> None:
    """kill -9 before, in and after every kind of write; see killed_run.py."""
    numbers = [str(number) for number in (first, last, stride)]
    process = subprocess.run(
        [sys.executable, "-m", "tests.train.killed_run", str(model_folder()), str(tmp_path), *numbers],
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    told = json.loads(process.stdout.splitlines()[-1])
    assert told["moments"] > 100
    assert told["killed"] >= (told["moments"] - first) // stride
    assert told["different"] == []


CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "learning rate": ({"config": quick_config(learning_rate=1e-3)}, ["optimize.learning_rate (0.02, now 0.001)"]),
    "two settings": (
        {"config": quick_config(seed=1, warmup_steps=1)},
        ["optimize.seed (0, now 1)", "optimize.warmup_steps (0, now 1)"],
    ),
    "region": ({"config": quick_config(trust_region="none")}, ["optimize.trust_region"]),
    "training data": ({"train": [*TRAIN, Example("more", "data")]}, ["the training data"]),
    "one weight": ({"train": [replace(TRAIN[0], weight=9.0), *TRAIN[1:]]}, ["the training data"]),
    "order": ({"train": TRAIN[::-1]}, ["the training data"]),
    "validation data": ({"validation": VALIDATION[1:]}, ["the validation data"]),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    run(folder, stop_at=4)
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_run_is_not_resumed(name: str, interrupted: Path) -> None:
    changed, words = CHANGES[name]
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="cannot be resumed, because this changed") as refusal:
        run(interrupted, **changed)
    for word in words:
        assert word in str(refusal.value)
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before


def test_another_prompt_or_model_is_not_resumed(interrupted: Path, tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="the prompt's text"):
        run(interrupted, prompt=SoftPrompt.from_text(model, "Say something else."))
    with pytest.raises(ConfigError, match="the prompt's template"):
        run(interrupted, prompt=SoftPrompt.from_text(model, "Say what it is.", Template.text("{prompt} {query} ")))
    moved = start_prompt(model)
    with pytest.raises(ConfigError, match="the prompt's embeddings"):
        run(interrupted, prompt=moved.replace(embeddings=moved.embeddings * 1.01))
    write_folder(tmp_path / "other", seed=1)
    other = load_model(tmp_path / "other", device="cpu")
    with pytest.raises(ConfigError, match="the model's weights"):
        optimize(other, start_prompt(other), TRAIN, VALIDATION, quick_config(), run_dir=interrupted, resume=True)


def test_what_may_change(tmp_path: Path, whole: tuple[OptimizeResult, dict[str, Any], Path]) -> None:
    run(tmp_path / "run", stop_at=4)
    config = quick_config(checkpoint_every=1, memory_policy="layer", memory_budget="1GB")
    assert torch.equal(run(tmp_path / "run", config=config).prompt.embeddings, whole[0].prompt.embeddings)


def test_a_folder_with_another_run_is_refused(interrupted: Path) -> None:
    with pytest.raises(ConfigError, match="already holds a run"):
        run(interrupted, resume=False)
    assert load_latest(interrupted / "checkpoints", 1000)[0] is not None


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "run"):
        for resume in (False, "auto"):
            with pytest.raises(ConfigError, match="another process"):
                run(tmp_path / "run", resume=resume)
    assert run(tmp_path / "run", resume=False).steps == 7


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_damaged_newest_checkpoint_falls_back(data: st.DataObject, interrupted: Path) -> None:
    """A checkpoint is truncated or has a flipped bit: the one before is used, and a note says so."""
    folder = interrupted.parent / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(interrupted, folder)
    newest, before = checkpoints(folder / "checkpoints")
    content = bytearray(newest.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    newest.write_bytes(content)
    state, problems = load_latest(folder / "checkpoints", 1000)
    assert state is not None
    assert state.step == load_state(before).step
    assert newest.name in problems[0]


def test_resuming_from_the_checkpoint_before(
    interrupted: Path, tmp_path: Path, whole: tuple[OptimizeResult, dict[str, Any], Path]
) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    newest = checkpoints(tmp_path / "run" / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:-3])
    progress = StopAt(0)
    result = run(tmp_path / "run", progress=progress)
    assert progress.done == 2
    assert newest.name in progress.notes[0]
    assert "step 2" in progress.notes[0]
    assert torch.equal(result.prompt.embeddings, whole[0].prompt.embeddings)
    assert outcome(tmp_path / "run") == whole[1]


def test_lost_metrics_also_fall_back(
    interrupted: Path, tmp_path: Path, whole: tuple[OptimizeResult, dict[str, Any], Path]
) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    run(tmp_path / "run")
    assert outcome(tmp_path / "run") == whole[1]


def test_nothing_usable_is_a_refusal(interrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    for path in checkpoints(tmp_path / "run" / "checkpoints"):
        path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot be resumed: the checkpoint .*step-00000004.*step-00000002"):
        run(tmp_path / "run")


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1}, {"step": 10**6}, {"step": 2.5}, {"step": True}, {"lines": -3}, {"lines": "x"},
        {"validated": 10**9}, {"best_step": None}, {"before": 7}, {"after": {"loss": "x", "accuracy": 1}},
        {"stop_reason": []},
        {"seconds": None}, {"identity": []}, {"e": torch.zeros(1, 1)}, {"m": torch.zeros(3, dtype=torch.int64)},
        {"best": torch.full((2, 2), float("nan"))},
    ],
    ids=str,
)  # fmt: skip
def test_a_forged_checkpoint_with_a_right_checksum(change: dict[str, Any], interrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    newest, *older = checkpoints(tmp_path / "run" / "checkpoints")
    state = load_state(newest)
    for path in (newest, *older):
        path.unlink()
    write_forged(newest, replace(state, **change))
    with pytest.raises(ConfigError, match=r"cannot be used|cannot be resumed|ask for more"):
        run(tmp_path / "run")


@pytest.mark.parametrize(
    "line", [b"[" * 10**6, b"{}", b'{"kind": "step"}', b'{"kind": 3, "step": 1}', b'{"kind": "step", "step": -1}']
)
def test_damaged_lines_of_the_metrics(
    line: bytes, interrupted: Path, whole: tuple[OptimizeResult, dict[str, Any], Path], tmp_path: Path
) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + line + b"\n")
    run(tmp_path / "run")
    assert outcome(tmp_path / "run") == whole[1]


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    tmp_path: Path, whole: tuple[OptimizeResult, dict[str, Any], Path]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: x\n")
    (tmp_path / "run" / ".config.yaml.abc.tmp").write_text("mod")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "st')
    run(tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == whole[1]
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_checkpoints_hold_everything_and_nothing_is_executed(tmp_path: Path) -> None:
    tensors = [torch.randn(3, 5) for _ in range(4)]
    before, after = {"accuracy": 0.5, "loss": 0.1}, {"accuracy": 1.0, "loss": 1e-17}
    state = RunState(*tensors, {"model": {"weights": "x"}}, 12, 30, 9, 6, 1, before, after, None, 2.5)
    path = save_state(tmp_path, state)
    again = load_state(path)
    for name in ("e", "m", "v", "best"):
        assert torch.equal(getattr(again, name), getattr(state, name))
    assert replace(again, e=0, m=0, v=0, best=0) == replace(state, e=0, m=0, v=0, best=0)  # type: ignore[arg-type]
    for step in (13, 14):
        save_state(tmp_path, replace(state, step=step))
    assert [file.name for file in checkpoints(tmp_path)] == ["step-00000014.safetensors", "step-00000013.safetensors"]
    (tmp_path / "step-00000099.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    assert load_latest(tmp_path, 1000)[0] is not None
