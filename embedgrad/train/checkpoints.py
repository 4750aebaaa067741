"""Checkpoints of an optimisation: everything the next step depends on, in one safetensors file each.

A checkpoint holds the prompt, the optimiser's moments, the best prompt so far, the counters, and what the run was
started with. Batches and rates are functions of the counters, so no random state is kept. A sha256 over all of it is
inside, because safetensors itself does not notice a flipped bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from embedgrad.data.example import Example
from embedgrad.util.errors import ConfigError
from embedgrad.util.files import write_atomic

KEPT = 2  # the newest checkpoint, and the one before in case the newest is damaged
FORMAT = 1
_TENSORS = ("e", "m", "v", "best")
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


RENDERING, COMPUTATION = "tokens of the data (tokenizer, chat template)", "computation"


@dataclass
class RunState:
    """Where an optimisation stands. Tensors are `[k, d]` in the prompt's type, on the CPU."""

    e: Tensor
    m: Tensor
    v: Tensor
    best: Tensor  # the prompt with the best validation so far; without validation data, e
    identity: dict[str, Any]  # what the run was started with; see `identity`
    step: int = 0  # optimiser steps taken
    lines: int = 0  # lines of metrics.jsonl that belong to this state
    validated: int = -1  # the step of the last validation; -1 before the first
    best_step: int = 0
    stale: int = 0  # validations since the best one
    before: dict[str, float] | None = None  # validation of the prompt as it started
    after: dict[str, float] | None = None  # validation of `best`
    stop_reason: str | None = None  # set when the run is over
    seconds: float = field(default=0.0)  # time spent, over all sessions


def identity(
    config: Mapping[str, Any],
    train: Sequence[Example],
    validation: Sequence[Example],
    prompt: Mapping[str, Any],
    model: Mapping[str, Any],
    rendering: str,
    computation: Mapping[str, Any],
) -> dict[str, Any]:
    """What a run's result depends on; a run resumes only where all of it is the same.

    rendering: a hash of the examples as tokens, which also depend on tokenizer and chat template. computation: backend,
    device and threads; with others a run may go on where that is allowed, and ends with other bits.
    """
    return {
        "model": dict(model),
        "prompt": dict(prompt),
        "training data": examples_hash(train),
        "validation data": examples_hash(validation),
        "config": json.loads(json.dumps(dict(config))),
        RENDERING: rendering,
        COMPUTATION: dict(computation),
    }


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What changed between two identities, in words: "optimize.seed (0, now 1)", "the training data".

    A checkpoint of an earlier version lacks some parts; they are not compared.
    """
    changed = []
    for part in current:
        before, now = saved.get(part), current[part]
        if before == now or part not in saved:
            continue
        if isinstance(now, Mapping) and isinstance(before, Mapping):
            names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            prefix = "optimize." if part == "config" else f"the {part}'s "
            changed += [f"{prefix}{name}{_change(before.get(name), now.get(name))}" for name in names]
        else:
            changed.append(f"the {part}")
    return changed


def _change(before: object, now: object) -> str:
    told = [str(value) for value in (before, now)]
    return f" ({told[0]}, now {told[1]})" if max(map(len, told)) <= 60 else ""


def examples_hash(examples: Sequence[Example]) -> str:
    """sha256 (hex) over queries, targets and weights in their order."""
    digest = hashlib.sha256()
    for example in examples:
        parts = [part if isinstance(part, str) else list(map(int, part)) for part in (example.query, example.target)]
        digest.update(json.dumps([*parts, float(example.weight)]).encode() + b"\n")
    return digest.hexdigest()


def tensor_hash(*tensors: Tensor) -> str:
    """sha256 (hex) over types, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_state(folder: Path, state: RunState) -> Path:
    """Write `state` to `folder`, then remove all but the `KEPT` newest checkpoints. Raises SaveError."""
    tensors = {name: getattr(state, name).contiguous() for name in _TENSORS}
    record = {one.name: getattr(state, one.name) for one in fields(state) if one.name not in _TENSORS}
    text = json.dumps({"format": FORMAT, **record})
    path = folder / f"step-{state.step:08d}.safetensors"
    metadata = {"state": text, "sha256": _checksum(text, tensors)}
    write_atomic(path, save_safetensors(tensors, metadata=metadata))
    for old in checkpoints(folder)[KEPT:]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's file name says."""
    return int(checkpoint.stem.removeprefix("step-"))


def load_latest(folder: Path, lines: int) -> tuple[RunState | None, list[str]]:
    """The newest usable checkpoint, or None, and why newer ones were passed over.

    lines: how many whole lines metrics.jsonl has; a checkpoint that needs more of them is not usable.
    """
    problems: list[str] = []
    for path in checkpoints(folder):
        try:
            state = load_state(path)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if state.lines > lines:
            problems.append(f"{path.name} needs {state.lines} lines of metrics.jsonl, which has {lines}.")
            continue
        return state, problems
    return None, problems


def load_state(path: Path) -> RunState:
    """Read one checkpoint. Raises ConfigError where it is damaged."""
    try:
        data = path.read_bytes()
        tensors = load_safetensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header["__metadata__"]
        text = metadata["state"]
        if metadata["sha256"] != _checksum(text, tensors):
            raise ValueError("its checksum does not match")
        record = json.loads(text)
        if record.pop("format") != FORMAT:
            raise ValueError("it was written by another version of embedgrad")
        values: dict[str, Any] = {**tensors, **record}
        return RunState(**values)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the checkpoint {path} cannot be used: {error}.") from error


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    head = json.dumps([text, names]).encode()
    return hashlib.sha256(head + tensor_hash(*(tensors[name] for name in names)).encode()).hexdigest()
