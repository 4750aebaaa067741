"""Several runs in one forest beside the same runs one by one."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.template import Template
from embedgrad.train.optimize import OptimizeResult, Run, optimize
from embedgrad.train.progress import Quiet
from embedgrad.train.together import optimize_together
from embedgrad.util.errors import ConfigError, TrainingError
from tests.train.training import TRAIN, VALIDATION, outcome, quick_config, tiny_model

TEXTS = ["Say what it is.", "What is it?", "Answer with one word, please."]


def start(text: str, after: bool = False) -> SoftPrompt:
    template = Template.text("{query} {prompt} ") if after else None
    return SoftPrompt.from_text(tiny_model(), text, template)


def alone(text: str, after: bool = False, **changes: Any) -> OptimizeResult:
    return optimize(tiny_model(), start(text, after), TRAIN, VALIDATION, quick_config(**changes))


RUNS = st.tuples(
    st.sampled_from(TEXTS), st.booleans(),
    st.fixed_dictionaries({
        "learning_rate": st.sampled_from([1e-3, 2e-2]), "seed": st.integers(0, 3), "steps": st.integers(2, 7),
        "batch_size": st.integers(1, 5), "optimizer": st.sampled_from(["adamw", "sgd"]),
        "trust_region": st.sampled_from([{"kind": "cosine", "tau": 0.9}, {"kind": "none"}]),
    }),
)  # fmt: skip


@settings(deadline=None, max_examples=10)
@given(st.lists(RUNS, min_size=1, max_size=4))
def test_each_run_is_what_it_is_alone(given_runs: list[tuple[str, bool, dict[str, Any]]]) -> None:
    """Other texts, places, rates, seeds, lengths and batches."""
    runs = [
        Run.of(start(text, after), TRAIN, VALIDATION, quick_config(**changes)) for text, after, changes in given_runs
    ]
    for result, (text, after, changes) in zip(optimize_together(tiny_model(), runs), given_runs, strict=True):
        expected = alone(text, after, **changes)
        assert isinstance(result, OptimizeResult)
        assert (result.steps, result.stop_reason) == (expected.steps, expected.stop_reason)
        for one, other in zip(result.history, expected.history, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=2e-5)
            assert one["accuracy"] == other["accuracy"]
        moved = result.last_prompt.embeddings - expected.last_prompt.embeddings
        assert float(moved.abs().max()) < 2e-4  # AdamW divides small gradients by their own size


def test_one_run_has_the_bits_that_it_has_alone() -> None:
    (result,) = optimize_together(tiny_model(), [Run.of(start(TEXTS[0]), TRAIN, VALIDATION, quick_config())])
    assert isinstance(result, OptimizeResult)
    assert torch.equal(result.last_prompt.embeddings, alone(TEXTS[0]).last_prompt.embeddings)


def test_a_run_that_fails_or_is_pruned_leaves_the_others(tmp_path: Path) -> None:
    config = quick_config()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").write_text("{}")
    diverging = quick_config(learning_rate=1e6, optimizer="sgd", momentum=0.9, trust_region="none")
    runs = [
        Run.of(start(TEXTS[0]), TRAIN, VALIDATION, config, run_dir=tmp_path / "good"),
        Run.of(start(TEXTS[0]), TRAIN, VALIDATION, diverging, run_dir=tmp_path / "diverging"),
        Run.of(start(TEXTS[1]), TRAIN, VALIDATION, config, prune=lambda record: record["step"] == 3),
        Run.of(start(TEXTS[1]), TRAIN, VALIDATION, config, run_dir=tmp_path / "taken"),
    ]
    good, bad, pruned, taken = optimize_together(tiny_model(), runs)
    assert isinstance(good, OptimizeResult)
    assert good.stop_reason == "completed"
    assert outcome(tmp_path / "good")["summary"]["steps"] == 7
    assert isinstance(bad, (TrainingError, OptimizeResult))
    assert isinstance(pruned, OptimizeResult)
    assert (pruned.stop_reason, pruned.steps) == ("pruned", 3)
    assert isinstance(taken, ConfigError)


class StopAt(Quiet):
    """Sends Ctrl-C after a step."""

    def step(self, record: Mapping[str, Any]) -> None:
        if record["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)


def test_interrupted_runs_go_on_together(tmp_path: Path) -> None:
    def runs(folder: str, **options: Any) -> list[Run]:
        return [
            Run.of(start(text), TRAIN, VALIDATION, quick_config(), run_dir=tmp_path / f"{folder}{i}", **options)
            for i, text in enumerate(TEXTS[:2])
        ]

    optimize_together(tiny_model(), runs("whole"))
    stopping = [runs("run", progress=StopAt())[0], runs("run")[1]]
    first = optimize_together(tiny_model(), stopping)
    assert [isinstance(each, OptimizeResult) and each.stop_reason for each in first] == ["interrupted"] * 2
    optimize_together(tiny_model(), runs("run", resume=True))
    for i in range(2):
        assert outcome(tmp_path / f"run{i}") == outcome(tmp_path / f"whole{i}")
