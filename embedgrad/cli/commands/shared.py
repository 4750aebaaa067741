"""Functions that several commands use: opening the model, writing files, and figures as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embedgrad.cli.terminal import tell
from embedgrad.engine.model import Model, load_model
from embedgrad.evaluation.evaluate import Evaluation, paired_tests
from embedgrad.evaluation.evaluate import shares as evaluation_shares
from embedgrad.evaluation.statistics import Accuracy
from embedgrad.train.paths import expand_path
from embedgrad.train.settings import RunConfig
from embedgrad.util.interrupts import Stopped

STOPPED = {"interrupted": 130, "terminated": 143, "hung up": 129}
"""Exit codes of commands that a signal stopped: 128 + the signal's number, as in shells."""


def stopped_by(stopped: BaseException, silent: bool = False) -> int:
    """Says that the command goes on when it is given again, unless `silent`. Returns the exit code.

    stopped: a `Stopped`, or a KeyboardInterrupt.
    """
    if not silent:
        tell("Stopped; the same command goes on from here.")
    return STOPPED[stopped.reason if isinstance(stopped, Stopped) else "interrupted"]


def with_folder(overrides: Sequence[str], data: Path | None) -> list[str]:
    """`overrides`, followed by one for the folder of the task's files if `data` is given."""
    return [*overrides, *([] if data is None else [f"data.folder={json.dumps(str(data))}"])]


def open_model(
    path: str,
    dtype: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    weights: str = "auto",
    max_device_memory: int | None = None,
    long_context: bool = False,
) -> Model:
    """`load_model` with ~ and $VARIABLES in `path` replaced. A path that does not exist may be a hub id."""
    return load_model(expand_path(path), dtype, backend, device, weights, max_device_memory, long_context)


def open_configured(config: RunConfig) -> Model:
    """The model of a configuration."""
    section = config.model
    return open_model(
        section.path, section.dtype, section.backend, section.device, section.weights, section.max_device_memory,
        section.long_context,
    )  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Writes a small text file, whole or not at all. Raises SaveError."""
    from embedgrad.util.files import write_atomic

    write_atomic(path, text.encode())


def with_interval(accuracy: Accuracy | None) -> str:
    """An accuracy with its 95 % interval, such as "0.895 (0.860 to 0.922)"; "-" for None."""
    return "-" if accuracy is None else f"{accuracy.value:.3f} ({accuracy.low:.3f} to {accuracy.high:.3f})"


def figures(tested: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The figures for summary.json; empty without evaluations.

    They are the number of test examples, each measure and its 95 % interval before and after, the grader, the
    statistics of the answers, and McNemar's test of before against after.
    """
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
    """The answers' statistics as text, such as "3.2 tokens, 12.0% invalid, 0.0% cut off, 0.0% looping"."""
    statistics = evaluation.statistics
    told = f"{statistics.tokens:.1f} tokens"
    if statistics.invalid is not None:
        told += f", {statistics.invalid:.1%} invalid"
    return told + f", {statistics.truncated:.1%} cut off, {statistics.loops:.1%} looping"
