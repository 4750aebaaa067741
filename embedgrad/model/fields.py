"""Typed access to fields of untrusted JSON or metadata. Every ModelError names the field and its value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embedgrad.model.files.recognise import stand_in
from embedgrad.util.errors import ModelError
from embedgrad.util.shown import short

_LARGEST_INT = 2**31 - 1


class Fields:
    """Typed access to a mapping of untrusted values. Records which fields have been read."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.values, self.where, self.prefix = values, where, prefix
        self.known: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """The value as it is."""
        self.known.add(name)
        return self.values.get(name, default)

    def integer(
        self, name: str, default: Any = "", *, none: int | None = None, most: int = _LARGEST_INT, same: bool = False
    ) -> int:
        """A whole number in [1, most]. none: value for null. same: accept an array of equal numbers as one number."""
        value = self.take(name, default)
        if same and isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if value is None and none is not None:
            return none
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            self._refuse(name, f"a whole number from 1 to {most}")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.take(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            self._refuse(name, "a positive number")
        try:
            return float(value)
        except OverflowError:
            self._refuse(name, "a positive number")
            raise

    def boolean(self, name: str, default: bool) -> bool:
        """True or false; `default` for null too."""
        value = self.take(name, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._refuse(name, "true or false")
        return bool(value)

    def expect(self, name: str, value: object) -> None:
        """Raises ModelError where the field has another value than `value` or null."""
        found = self.take(name, value)
        if found is not None and (isinstance(found, np.ndarray) or found != value):
            raise ModelError(f'{self.where}: "{self.prefix}{name}" is {short(found)}; supported is {value!r} only.')

    def refuse_the_rest(self, harmless: frozenset[str]) -> None:
        """Raises ModelError for a field that was never read and is not in `harmless`; null and false are ignored."""
        for name, value in self.values.items():
            if name in self.known or name in harmless or value is None or value is False:
                continue
            raise ModelError(
                f'{self.where}: "{self.prefix}{name}" is {short(value)}; this field is not understood, and '
                f"ignoring it could change what the model computes."
            )

    def _refuse(self, name: str, right: str) -> None:
        if self.values.get(name) is None:
            raise ModelError(f'{self.where}: "{self.prefix}{name}" is missing; it should be {right}.')
        found = short(self.values[name])
        raise ModelError(f'{self.where}: "{self.prefix}{name}" is {found}; it should be {right}.')


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} {stand_in(path) or 'is not readable JSON; fetch it again'}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} should hold a JSON object.")
    return value
