"""Search states in a file: a safetensors file with the states' tensors, and everything else as JSON in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as pack

from embedgrad.search.search import SearchState
from embedgrad.util.errors import ConfigError
from embedgrad.util.files import write_atomic
from embedgrad.util.shown import first_line
from embedgrad.util.tensor_bytes import unpack

_BETWEEN = "|"  # between a search's name and that of its tensor


def write_states(path: Path, states: Mapping[str, SearchState], values: Mapping[str, Any]) -> None:
    """Writes the states by name and further JSON values, whole or not at all. Raises SaveError."""
    tensors = {
        f"{name}{_BETWEEN}{key}": tensor.contiguous()
        for name, state in states.items()
        for key, tensor in state.tensors.items()
    }
    content = {"searches": {name: state.to_json() for name, state in states.items()}, "values": dict(values)}
    write_atomic(path, pack(tensors or {"none": torch.zeros(1)}, {"content": json.dumps(content)}))


def read_states(path: Path) -> tuple[dict[str, SearchState], dict[str, Any]]:
    """(states by name, further values) as `write_states` wrote them. Raises ConfigError for a damaged file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({first_line(error)}); remove it, or give another folder.") from error
    return states_in(data, path)


def states_in(data: bytes, path: Path) -> tuple[dict[str, SearchState], dict[str, Any]]:
    """What `read_states` gives, of the bytes of the file at `path`. Raises ConfigError for a damaged file."""
    try:
        loaded, metadata = unpack(data)
        content = json.loads(metadata["content"])
        tensors = {tuple(name.split(_BETWEEN)): tensor for name, tensor in loaded.items()}
        states = {
            name: SearchState.of(state, {key[-1]: x for key, x in tensors.items() if key[0] == name})
            for name, state in content["searches"].items()
        }
        return states, dict(content["values"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({first_line(error)}); remove it, or give another folder.") from error
