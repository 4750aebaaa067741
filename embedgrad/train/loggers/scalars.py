"""The numbers in a record that a logger can plot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers in the record of a step or validation, by name, such as "train/loss" or
    "validation/answers/tokens". Lists, texts and missing values are left out."""
    place = {"step": "train"}.get(record["kind"], record["kind"])
    return dict(_flat(place, {key: value for key, value in record.items() if key not in ("kind", "step")}))


def _flat(place: str, values: Mapping[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(f"{place}/{key}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((f"{place}/{key}", float(value)))
    return found
