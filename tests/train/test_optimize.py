"""The optimisation loop on a tiny model: what it computes, what it keeps, and how it refuses."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.data.example import Example
from embedgrad.engine import prompt_trainer
from embedgrad.engine.gradient import Details, launch_gradient, loss_and_grad
from embedgrad.engine.scorer import Scorer, score
from embedgrad.maths.optimizer import AdamW
from embedgrad.maths.trust_region import CosineCone, cosine_similarity
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.train.checkpoints import load_latest
from embedgrad.train.optimize import optimize
from embedgrad.train.progress import Quiet
from embedgrad.train.run_folder import RunFolder, read_summary
from embedgrad.train.session import batch_indices
from embedgrad.train.settings import OptimizeConfig
from embedgrad.util.errors import ConfigError, ContextError, DataError, EmbedGradError, SaveError, TrainingError
from tests.train.training import TRAIN, VALIDATION, quick_config, start_prompt, tiny_model


class Spy(Quiet):
    """Calls `act(step)` after each step, and records all calls."""

    def __init__(self, act: Any = None) -> None:
        self.act = act
        self.steps: list[int] = []
        self.stopped = 0

    def step(self, record: Mapping[str, Any]) -> None:
        self.steps.append(record["step"])
        if self.act is not None:
            self.act(record["step"])

    def stop(self) -> None:
        self.stopped += 1


def test_steps_are_those_of_the_definition() -> None:
    """The loop's last prompt equals gradient and step (the backend's) written out by hand, bit for bit."""
    model = tiny_model()
    prompt = start_prompt(model)
    config = OptimizeConfig(steps=5, batch_size=4, learning_rate=3e-2, trust_region={"tau": 0.9}, seed=5)
    result = optimize(model, prompt, TRAIN, None, config)
    e = prompt.embeddings.clone()
    m, v = torch.zeros_like(e), torch.zeros_like(e)
    for step in range(5):
        batch = [TRAIN[i] for i in batch_indices(len(TRAIN), 4, step, 5)]
        loss, gradient = loss_and_grad(model, prompt.replace(embeddings=e), batch)
        assert result.history[step]["loss"] == loss
        assert result.history[step]["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-6)
        factors = AdamW().factors(step + 1, 3e-2)
        model.ops.prompt_step(e, prompt.anchor, m, v, gradient, factors=factors, region=CosineCone(0.9))
        similarity = cosine_similarity(e, prompt.anchor)
        assert result.history[step]["similarity_min"] == pytest.approx(float(similarity.min()), rel=1e-12)
        assert result.history[step]["similarity_mean"] == pytest.approx(float(similarity.mean()), rel=1e-12)
    assert torch.equal(result.last_prompt.embeddings, e)
    assert torch.equal(result.prompt.embeddings, e)  # no validation data: the last is the best
    assert result.stop_reason == "completed"
    assert result.weights_unchanged
    assert torch.equal(prompt.embeddings, prompt.anchor)  # the argument is as it was


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 1.0},
        {"trust_region": {"kind": "mean_cosine", "tau": 0.9}},
        {"trust_region": {"kind": "l2_ball", "radius": 0.2}},
        {"trust_region": {"kind": "penalty", "weight": 0.5}},
        {"trust_region": "none", "clip_norm": 0.1, "schedule": "linear", "warmup_steps": 2},
    ],
)
def test_every_region_learns_and_holds(changes: dict[str, Any]) -> None:
    model = tiny_model()
    config = quick_config(**{"steps": 12, **changes})
    result = optimize(model, start_prompt(model), TRAIN, VALIDATION, config)
    assert result.before is not None
    assert result.after is not None
    assert result.after["loss"] < result.before["loss"] - 0.05
    assert result.best_step > 0
    for record in result.history:
        assert math.isfinite(record["loss"])
        assert record["norm_ratio_min"] <= record["norm_ratio_max"]
    if isinstance(config.trust_region, CosineCone):
        assert result.min_similarity >= config.trust_region.tau - 1e-6
        assert min(record["similarity_min"] for record in result.history) >= config.trust_region.tau - 1e-6


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(0, 3))
def test_each_epoch_uses_every_example_once(examples: int, batch_size: int, epoch: int, seed: int) -> None:
    per_epoch = -(-examples // batch_size)
    batches = [batch_indices(examples, batch_size, epoch * per_epoch + i, seed) for i in range(per_epoch)]
    assert Counter(index for batch in batches for index in batch) == Counter(range(examples))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert len(batches[-1]) == (examples % batch_size or batch_size)


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = [tuple(batch_indices(50, 50, epoch, seed)) for epoch in range(3) for seed in range(3)]
    assert len(set(orders)) == 9


def script_scores(monkeypatch: pytest.MonkeyPatch, figures: list[tuple[float, float]]) -> None:
    """Validations give these (accuracy, loss), one after another."""
    waiting = iter(figures)

    def fake(scorer: Any, embeddings: Any, chunk: int) -> Details:
        accuracy, loss = next(waiting)
        exact = torch.arange(len(VALIDATION)) < round(accuracy * len(VALIDATION))
        return Details(torch.full((len(VALIDATION),), loss), [], exact)

    monkeypatch.setattr(Scorer, "details", fake)


@pytest.mark.parametrize(
    ("select_by", "figures", "best_step"),
    [
        ("accuracy", [(0.5, 1.0), (0.75, 2.0), (0.5, 0.1), (0.5, 0.2)], 2),
        ("accuracy", [(0.5, 1.0), (0.5, 0.9), (0.5, 0.8), (0.5, 0.8)], 4),  # ties: the loss; equal: the earlier
        ("accuracy", [(0.75, 1.0), (0.5, 0.1), (0.5, 0.1), (0.5, 0.1)], 0),  # the prompt as it was
        ("loss", [(0.5, 1.0), (0.75, 2.0), (0.5, 0.1), (1.0, 0.2)], 4),
    ],
)
def test_the_best_by_validation_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, select_by: str, figures: list[tuple[float, float]], best_step: int
) -> None:
    model = tiny_model()
    validation = [replace(example, weight=1.0) for example in VALIDATION]
    script_scores(monkeypatch, figures)
    kept = {0: start_prompt(model).embeddings.clone()}

    class Keep(Spy):
        def validation(self, record: Mapping[str, Any]) -> None:
            saved = SoftPrompt.load(tmp_path / "run" / "prompt.safetensors", model)
            if record["best"]:
                kept[record["step"]] = saved.embeddings.clone()

    config = quick_config(steps=6, validate_every=2, select_by=select_by)
    result = optimize(model, start_prompt(model), TRAIN, validation, config, run_dir=tmp_path / "run", progress=Keep())
    assert result.best_step == best_step
    assert torch.equal(result.prompt.embeddings, kept[best_step])
    assert result.before == {"accuracy": figures[0][0], "loss": pytest.approx(figures[0][1])}
    assert result.after == {
        "accuracy": figures[best_step // 2][0],
        "loss": pytest.approx(figures[best_step // 2][1]),
    }
    assert result.prompt.metadata["metrics"]["step"] == best_step
    assert result.prompt.metadata["trust_region"]["tau"] == 0.8
    assert [record["step"] for record in result.validations] == [0, 2, 4, 6]


def test_early_stopping_counts_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    script_scores(monkeypatch, [(0.5, 1.0), (0.5, 0.9), (0.5, 0.95), (0.5, 0.93), (1.0, 0.0)])
    model = tiny_model()
    config = quick_config(steps=50, validate_every=2, patience=2)
    result = optimize(model, start_prompt(model), TRAIN, VALIDATION, config)
    assert (result.stop_reason, result.steps, result.best_step) == ("early stopping", 6, 2)


def test_validation_is_weighted_as_the_examples_are() -> None:
    model = tiny_model()
    result = optimize(model, start_prompt(model), TRAIN, VALIDATION, quick_config(steps=1))
    losses = score(model, start_prompt(model), VALIDATION).example_loss.double()
    weights = torch.tensor([example.weight for example in VALIDATION], dtype=torch.float64)
    assert result.before is not None
    assert result.before["loss"] == pytest.approx(float((losses * weights).sum() / weights.sum()))


def test_examples_of_weight_zero_are_left_out() -> None:
    model = tiny_model()
    prompt = start_prompt(model)
    silent = [Example("never", "seen", weight=0.0)] * 20
    config = quick_config(steps=4)
    with_silent = optimize(model, prompt, [*silent, *TRAIN], [*VALIDATION, *silent], config)
    without = optimize(model, prompt, TRAIN, VALIDATION, config)
    assert torch.equal(with_silent.prompt.embeddings, without.prompt.embeddings)
    with pytest.raises(DataError, match="no training examples"):
        optimize(model, prompt, silent, None, config)


def test_a_prompt_outside_the_region_starts_on_its_boundary() -> None:
    model = tiny_model()
    prompt = start_prompt(model)
    far = prompt.replace(embeddings=prompt.anchor + 5 * torch.randn(prompt.anchor.shape))
    result = optimize(model, far, TRAIN, VALIDATION, quick_config(steps=1, learning_rate=1e-9))
    assert result.min_similarity >= 0.8 - 1e-6


def poisoned(step: int, loss: float = 1.0, gradient: float = 1.0) -> Any:
    """loss_and_grad whose result is spoilt in call `step` (from 1)."""
    calls = 0

    def fake(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        nll, predicted, true_gradient = launch_gradient(*arguments, **options)
        return (nll * loss, predicted, true_gradient * gradient) if calls == step else (nll, predicted, true_gradient)

    return fake


@pytest.mark.parametrize(
    "spoilt", [{"loss": math.nan}, {"loss": math.inf}, {"gradient": math.nan}, {"gradient": math.inf}]
)
def test_what_is_not_finite_stops_the_run_with_the_last_good_state_on_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoilt: dict[str, float]
) -> None:
    model = tiny_model()
    config = quick_config(checkpoint_every=100)
    whole = optimize(model, start_prompt(model), TRAIN, VALIDATION, config, run_dir=tmp_path / "whole")
    monkeypatch.setattr(prompt_trainer, "launch_gradient", poisoned(6, **spoilt))
    with pytest.raises(TrainingError, match=r"step 6; the state after step 5 is in .*learning_rate"):
        optimize(model, start_prompt(model), TRAIN, VALIDATION, config, run_dir=tmp_path / "run")
    state, problems = load_latest(tmp_path / "run" / "checkpoints", 1000)
    assert state is not None
    assert (state.step, problems) == (5, [])
    assert torch.isfinite(state.e).all()
    monkeypatch.undo()
    resumed = optimize(model, start_prompt(model), TRAIN, VALIDATION, config, run_dir=tmp_path / "run", resume=True)
    assert torch.equal(resumed.prompt.embeddings, whole.prompt.embeddings)


def test_an_overflowing_step_is_taken_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model()
    monkeypatch.setattr(prompt_trainer, "launch_gradient", poisoned(1, gradient=1e38))
    config = quick_config(optimizer="sgd", learning_rate=1e5, schedule="constant")
    with pytest.raises(TrainingError, match=r"overflow in step 1; the state after step 0"):
        optimize(model, start_prompt(model), TRAIN, None, config, run_dir=tmp_path)
    state, _ = load_latest(tmp_path / "checkpoints", 1000)
    assert state is not None
    assert torch.equal(state.e, start_prompt(model).embeddings)
    assert torch.isfinite(state.e).all()


def test_any_failure_of_the_engine_leaves_the_state_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = iter(range(10))

    def fails(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise MemoryError("no room")
        return launch_gradient(*arguments, **options)

    monkeypatch.setattr(prompt_trainer, "launch_gradient", fails)
    model = tiny_model()
    with pytest.raises(MemoryError):
        optimize(model, start_prompt(model), TRAIN, None, quick_config(checkpoint_every=100), run_dir=tmp_path)
    state, _ = load_latest(tmp_path / "checkpoints", 1000)
    assert state is not None
    assert state.step == 3


def test_changed_weights_are_an_error(tmp_path: Path) -> None:
    model = tiny_model()
    rows = model.weights.embedding

    def change(step: int) -> None:
        if step == 2:
            rows[0, 0] += 1.0

    with pytest.raises(TrainingError, match="weights changed"):
        optimize(model, start_prompt(model), TRAIN, None, quick_config(), progress=Spy(change))
    rows[0, 0] -= 1.0


@pytest.mark.parametrize(
    ("number", "clean", "reason"),
    [(signal.SIGINT, False, "interrupted"), (signal.SIGTERM, True, "terminated"), (signal.SIGHUP, True, "hung up")],
)
def test_signals_end_a_run_after_the_step(tmp_path: Path, number: int, clean: bool, reason: str) -> None:
    model = tiny_model()
    spy = Spy(lambda step: os.kill(os.getpid(), number) if step == 4 else None)
    result = optimize(
        model, start_prompt(model), TRAIN, VALIDATION, quick_config(steps=50, checkpoint_every=100),
        run_dir=tmp_path, progress=spy, terminate_cleanly=clean,
    )  # fmt: skip
    assert (result.stop_reason, result.steps, spy.stopped) == (reason, 4, 1)
    assert read_summary(tmp_path)["stop_reason"] == reason
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    model = tiny_model()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        spy = Spy(lambda step: os.kill(os.getpid(), signal.SIGHUP) if step == 2 else None)
        result = optimize(model, start_prompt(model), TRAIN, None, quick_config(), progress=spy, terminate_cleanly=True)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.stop_reason == "completed"


def test_a_second_interrupt_acts_at_once() -> None:
    model = tiny_model()

    def twice(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        optimize(model, start_prompt(model), TRAIN, None, quick_config(), progress=Spy(twice))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_runs_outside_the_main_thread() -> None:
    model = tiny_model()
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(optimize(model, start_prompt(model), TRAIN, None, quick_config(steps=2)))
    )
    thread.start()
    thread.join()
    assert results[0].steps == 2


def test_the_run_folder(tmp_path: Path) -> None:
    model = tiny_model()
    result = optimize(model, start_prompt(model), TRAIN, VALIDATION, quick_config(), run_dir=tmp_path / "a" / "run")
    folder = tmp_path / "a" / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "checkpoints", "config.yaml", "last.safetensors", "metrics.jsonl", "prompt.safetensors",
        "summary.json",
    ]  # fmt: skip
    assert len(list((folder / "checkpoints").iterdir())) == 2
    assert torch.equal(SoftPrompt.load(folder / "prompt.safetensors", model).embeddings, result.prompt.embeddings)
    assert torch.equal(SoftPrompt.load(folder / "last.safetensors", model).embeddings, result.last_prompt.embeddings)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert OptimizeConfig(**config["optimize"]) == quick_config()
    summary = read_summary(folder)
    assert summary["steps"] == 7
    assert summary["min_similarity"] == result.min_similarity
    assert summary["weights_unchanged"] is True
    assert summary["train_seconds"] == result.train_seconds > 0


def test_refusals_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the engine was called")

    monkeypatch.setattr(prompt_trainer, "launch_gradient", never)
    monkeypatch.setattr(Scorer, "details", never)
    model = tiny_model()
    prompt, config = start_prompt(model), quick_config()
    (tmp_path / "file").write_text("not a folder")

    def refused(kind: type[EmbedGradError], words: str, *changed: Any, **options: Any) -> None:
        arguments = [prompt, TRAIN, VALIDATION, config]
        arguments[: len(changed)] = changed
        with pytest.raises(kind, match=words):
            optimize(model, *arguments, **options)

    refused(DataError, "no training examples", prompt, [])
    refused(DataError, "training example 3", prompt, [*TRAIN[:2], Example("", "x")])
    refused(DataError, "validation example 1", prompt, TRAIN, [Example("x", "")])
    refused(ContextError, "training example 2", prompt, [TRAIN[0], Example("long " * 400, "x")])
    refused(DataError, "training data .* number 1 is of type tuple", prompt, [TRAIN[0], ("a", "b")])
    refused(DataError, "validation data must be a list", prompt, TRAIN, TRAIN[0])
    refused(ConfigError, "an OptimizeConfig, not dict", prompt, TRAIN, VALIDATION, {"steps": 1})
    refused(ConfigError, "patience", prompt, TRAIN, None, quick_config(patience=2))
    refused(ConfigError, "warmup_steps is 9", prompt, TRAIN, VALIDATION, quick_config(warmup_steps=9))
    refused(ConfigError, "run_dir", resume=True)
    refused(ConfigError, "no run to resume", run_dir=tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()
    refused(SaveError, "run folder", run_dir=tmp_path / "file" / "run")


def test_a_full_disk_is_seen_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Scorer, "details", lambda *arguments: pytest.fail("training began"))
    model = tiny_model()
    with pytest.raises(SaveError, match="No space left on device"):
        optimize(model, start_prompt(model), TRAIN, VALIDATION, quick_config(), run_dir=tmp_path / "run")


@pytest.mark.parametrize("what", ["checkpoint", "metrics"])
def test_a_disk_that_fills_up_loses_nothing_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str) -> None:
    model = tiny_model()
    whole = optimize(model, start_prompt(model), TRAIN, VALIDATION, quick_config(), run_dir=tmp_path / "whole")
    true_fsync = os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(step: int) -> None:
        if step == 4 and what == "checkpoint":
            monkeypatch.setattr(os, "fsync", full)
        if step == 4 and what == "metrics":
            monkeypatch.setattr(
                RunFolder, "append", lambda *_: (_ for _ in ()).throw(SaveError("No space left on device"))
            )

    with pytest.raises(SaveError, match="No space left on device"):
        optimize(
            model, start_prompt(model), TRAIN, VALIDATION, quick_config(), run_dir=tmp_path / "run", progress=Spy(fill)
        )
    monkeypatch.undo()
    assert os.fsync is true_fsync
    assert not list((tmp_path / "run").rglob("*.tmp"))
    state, problems = load_latest(tmp_path / "run" / "checkpoints", 1000)
    assert state is not None
    assert (state.step, problems) == (4 if what == "metrics" else 2, [])
    resumed = optimize(
        model, start_prompt(model), TRAIN, VALIDATION, quick_config(), run_dir=tmp_path / "run", resume=True
    )
    assert torch.equal(resumed.prompt.embeddings, whole.prompt.embeddings)


@pytest.mark.parametrize("kibibytes", [4, 64, 100])
def test_on_a_disk_that_is_really_full(tmp_path: Path, kibibytes: int) -> None:
    """On a file system of a few pages the run is refused at the start or stopped later, with a sentence."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        model = tiny_model()
        config = quick_config(steps=400, validate_every=100, batch_size=1)
        with pytest.raises(SaveError, match="No space left on device"):
            optimize(model, start_prompt(model), TRAIN, None, config, run_dir=disk / "run")
        state, problems = load_latest(disk / "run" / "checkpoints", 100000)
        assert problems == []
        assert (state is not None and state.step > 0) == (kibibytes == 100)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["float32", "float64"]))
def test_same_inputs_same_bits(seed: int, dtype: str) -> None:
    model = tiny_model()
    prompt = start_prompt(model)
    prompt = prompt.replace(embeddings=prompt.embeddings.to(getattr(torch, dtype)))
    config = quick_config(steps=2, seed=seed)
    one, two = (optimize(model, prompt, TRAIN, VALIDATION, config) for _ in range(2))
    assert torch.equal(one.last_prompt.embeddings, two.last_prompt.embeddings)
    assert one.last_prompt.embeddings.dtype == getattr(torch, dtype)
