"""What a distillation has done so far: one file, written whole after each piece of work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedgrad.search.search import SearchState
from embedgrad.search.state_file import read_states, write_states
from embedgrad.util.errors import ConfigError

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
        self.searches, values = read_states(self.path)
        try:
            known = values["identity"]
            self.scores, self.sources = values["scores"], values["sources"]
            self.judged, self.tests = values["judged"], values["tests"]
        except KeyError as error:
            raise ConfigError(f"{self.path} lacks {error}; remove it, or give another --output.") from error
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
            "tests": self.tests,
        }  # fmt: skip
        write_states(self.path, self.searches, values)

    @property
    def spent(self) -> dict[str, int]:
        """Tokens by what they were spent on."""
        return {
            "scoring": sum(one["spent"] for one in self.scores.values()),
            "candidates": sum(one["spent"] for one in self.sources.values()),
            "search": sum(state.spent for state in self.searches.values()),
        }
