"""Checkpoints of an optimisation: everything the next step depends on, in one safetensors file each.

A checkpoint holds the prompt, the optimiser's moments, the best prompt so far, the counters, and what the run was
started with. Batches and rates are functions of the counters, so no random state is kept. A sha256 over all of it is
inside, because safetensors itself does not notice a flipped bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from embedgrad.data.example import Example
from embedgrad.util.errors import ConfigError
from embedgrad.util.files import write_atomic
from embedgrad.util.shown import short
from embedgrad.util.tensor_bytes import unpack

CHECKPOINTS = 2  # the newest checkpoint, and the one before in case the newest is damaged
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
    """Write `state` to `folder`, then remove all but the `CHECKPOINTS` newest checkpoints. Raises SaveError."""
    path = folder / f"step-{state.step:08d}.safetensors"
    write_atomic(path, encode(state))
    for old in checkpoints(folder)[CHECKPOINTS:]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def encode(state: RunState) -> bytes:
    """`state` as the bytes of a safetensors file."""
    tensors = {name: getattr(state, name).contiguous() for name in _TENSORS}
    record = {one.name: getattr(state, one.name) for one in fields(state) if one.name not in _TENSORS}
    text = json.dumps({"format": FORMAT, **record})
    return save_safetensors(tensors, metadata={"state": text, "sha256": _checksum(text, tensors)})


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
        return decode(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the checkpoint {path} cannot be used: {error}.") from error


def decode(data: bytes) -> RunState:
    """The state of which `encode` made `data`. Raises ValueError where it is damaged."""
    try:
        tensors, metadata = unpack(data)
        text = metadata["state"]
        if metadata["sha256"] != _checksum(text, tensors):
            raise ValueError("its checksum does not match")
        record = json.loads(text)
        if record.pop("format") != FORMAT:
            raise ValueError("it was written by another version of embedgrad")
        values: dict[str, Any] = {**tensors, **record}
        state = RunState(**values)
        _check_types(state)
        return state
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(error) from error


def check_counts(state: RunState, like: RunState, total: int) -> None:
    """Raises ConfigError where `state` cannot be of a run of `total` steps that began as `like`."""
    for name in _TENSORS:
        found, right = getattr(state, name), getattr(like, name)
        if found.shape != right.shape or found.dtype != right.dtype:
            raise ConfigError(
                f"the checkpoint of step {state.step} cannot be used: its {name} is {short(list(found.shape))} "
                f"{found.dtype}, but should be {list(right.shape)} {right.dtype}."
            )
    if state.step > total:
        raise ConfigError(f"the checkpoint of step {state.step} cannot be used: the run has {total} steps only.")


def _check_types(state: RunState) -> None:
    """Raises ValueError where a part of `state` is of another type than a run writes, or a count is impossible."""
    for name in _TENSORS:
        tensor = getattr(state, name)
        if not tensor.is_floating_point() or tensor.dim() != 2 or not bool(tensor.isfinite().all()):
            raise ValueError(f"its {name} is not a matrix of finite numbers")
    for name, least in (("step", 0), ("lines", 0), ("validated", -1), ("best_step", 0), ("stale", 0)):
        value = getattr(state, name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 53:
            raise ValueError(f"its {name} is {short(value)}, but should be a whole number from {least} on")
    if max(state.validated, state.best_step) > state.step:
        raise ValueError(f"its step is {state.step}, but its validations are of later steps")
    for name in ("before", "after"):
        measured = getattr(state, name)
        if measured is not None and not (isinstance(measured, dict) and all(map(_is_number, measured.values()))):
            raise ValueError(f"its {name} is {short(measured)}, but should be measures by their names")
        if measured and not {"accuracy", "loss"} <= set(measured):
            raise ValueError(f"its {name} lacks accuracy or loss")
    if state.stop_reason is not None and not isinstance(state.stop_reason, str):
        raise ValueError(f"its stop_reason is {short(state.stop_reason)}, but should be text")
    if not isinstance(state.identity, dict) or not _is_number(state.seconds):
        raise ValueError("its identity or its seconds are of a wrong type")


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 53
    return isinstance(value, float) and math.isfinite(value)


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    head = json.dumps([text, names]).encode()
    return hashlib.sha256(head + tensor_hash(*(tensors[name] for name in names)).encode()).hexdigest()
