"""What a distillation has done so far: one file, written whole after each piece of work.

The file is a safetensors file: the searches' tensors, and everything else as JSON in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as pack

from embedgrad.search.search import SearchState
from embedgrad.util.errors import ConfigError
from embedgrad.util.files import write_atomic
from embedgrad.util.shown import first_line

FILE = "state.safetensors"


class Ledger:
    """The work of a distillation in `folder`.

    scores: {text: what was measured of it}. sources: {name: {"texts": [[source, text]...], "spent": tokens}}. searches:
    {name: state}. judged: {name of the judge: {text: verdicts}}. tests: {what: verdicts by measure}.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Opens what is there, or begins. Raises ConfigError where it belongs to another distillation or is damaged."""
        self.path = folder / FILE
        self.scores: dict[str, dict[str, Any]] = {}
        self.sources: dict[str, dict[str, Any]] = {}
        self.searches: dict[str, SearchState] = {}
        self.judged: dict[str, dict[str, list[bool | None]]] = {}
        self.tests: dict[str, dict[str, list[bool]]] = {}
        self._identity = json.loads(json.dumps(dict(identity)))
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            data = self.path.read_bytes()
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            values = json.loads(header["__metadata__"]["ledger"])
            tensors = parse(data)
            known = values["identity"]
            self.scores, self.sources = values["scores"], values["sources"]
            self.judged, self.tests = values["judged"], values["tests"]
            for name, state in values["searches"].items():
                own = {key.split("|")[1]: x for key, x in tensors.items() if key.split("|")[0] == name}
                self.searches[name] = SearchState.of(state, own)
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError, SafetensorError) as error:
            raise ConfigError(
                f"{self.path} cannot be read ({first_line(error)}); remove it, or give another --output."
            ) from error
        changed = [key for key in self._identity if known.get(key) != self._identity[key]]
        if changed:
            raise ConfigError(
                f"{self.path.parent} holds a distillation with another {' and '.join(changed)}; give another --output, "
                "or remove it."
            )

    def save(self) -> None:
        """Writes everything, whole or not at all. Raises SaveError."""
        values = {
            "identity": self._identity, "scores": self.scores, "sources": self.sources, "judged": self.judged,
            "tests": self.tests, "searches": {name: state.to_json() for name, state in self.searches.items()},
        }  # fmt: skip
        tensors = {
            f"{name}|{key}": tensor.contiguous()
            for name, state in self.searches.items()
            for key, tensor in state.tensors.items()
        }
        write_atomic(self.path, pack(tensors or {"none": torch.zeros(1)}, {"ledger": json.dumps(values)}))

    @property
    def spent(self) -> dict[str, int]:
        """Tokens by what they were spent on."""
        return {
            "scoring": sum(one["spent"] for one in self.scores.values()),
            "candidates": sum(one["spent"] for one in self.sources.values()),
            "search": sum(state.spent for state in self.searches.values()),
        }
