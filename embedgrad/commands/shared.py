"""What several commands need: the model, a configuration with its task, and figures as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embedgrad.evaluation import Evaluation, paired_tests
from embedgrad.evaluation import shares as evaluation_shares
from embedgrad.model.model import Model, load_model
from embedgrad.settings import RunConfig, expand_path
from embedgrad.statistics import Accuracy

STOPPED = {"interrupted": 130, "terminated": 143}
"""Exit codes of commands that a signal ended: 128 + its number, as shells have it."""


def with_folder(overrides: Sequence[str], data: Path | None) -> list[str]:
    """Overrides of a configuration and, behind them, the folder of the task's files, where one is named."""
    return [*overrides, *([] if data is None else [f"data.folder={json.dumps(str(data))}"])]


def open_model(
    path: str,
    dtype: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    weights: str = "auto",
    max_device_memory: int | None = None,
) -> Model:
    """`load_model`, with ~ and $VARIABLES in `path` replaced; a path that does not exist may be a hub id."""
    return load_model(expand_path(path), dtype, backend, device, weights, max_device_memory)


def open_configured(config: RunConfig) -> Model:
    """The model of a configuration."""
    section = config.model
    return open_model(
        section.path, section.dtype, section.backend, section.device, section.weights, section.max_device_memory
    )


def write_text(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all. Raises SaveError."""
    from embedgrad.files import write_atomic

    write_atomic(path, text.encode())


def with_interval(accuracy: Accuracy | None) -> str:
    """A share with its 95 % interval: "0.895 (0.860 to 0.922)"; "-" where it was not measured."""
    return "-" if accuracy is None else f"{accuracy.value:.3f} ({accuracy.low:.3f} to {accuracy.high:.3f})"


def figures(tested: Mapping[str, Evaluation]) -> dict[str, Any]:
    """For a summary: each measure {before, after}, their 95 % intervals alike, the statistics of the answers, the
    number of test examples, and McNemar's test of before against after; empty without evaluations."""
    if not tested:
        return {}
    content: dict[str, Any] = {"test_examples": len(tested["after"].records), "intervals": {}}
    for name, shares in evaluation_shares(tested).items():
        content[name] = {when: share.value for when, share in shares.items()}
        content["intervals"][name] = {when: [share.low, share.high] for when, share in shares.items()}
    content["grader"] = tested["after"].grader
    content["answers"] = {when: evaluation.statistics.to_dict() for when, evaluation in tested.items()}
    if "before" in tested:
        tests = paired_tests(tested["before"], tested["after"])
        content["mcnemar"] = {name: asdict(test) for name, test in tests.items()}
    return content


def answers_told(evaluation: Evaluation) -> str:
    """The answers' statistics in a few words: "3.2 tokens, 12.0 % invalid, 0.0 % cut off"."""
    statistics = evaluation.statistics
    told = f"{statistics.tokens:.1f} tokens"
    if statistics.invalid is not None:
        told += f", {statistics.invalid:.1%} invalid"
    return told + f", {statistics.truncated:.1%} cut off, {statistics.loops:.1%} looping"
