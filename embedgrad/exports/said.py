"""Reads a written configuration again and says in what the model differs from the one that is exported."""

from __future__ import annotations

import math
from collections.abc import Sequence

from embedgrad.model.config import ModelConfig
from embedgrad.util.shown import short

_TOLD = {"scale": "query_scale"}  # the field that says it


def unsaid(wanted: ModelConfig, said: ModelConfig, names: Sequence[str], tolerance: float) -> str | None:
    """What `said` has another value for than `wanted`, such as "query_scale is 0.1"; None where it has none.

    names: the properties of `ModelConfig` that are compared. tolerance: relative, of floating-point numbers.
    """
    for name in names:
        one, other = getattr(wanted, name), getattr(said, name)
        close = isinstance(one, float) and other and math.isclose(one, other, rel_tol=tolerance)
        if not (close or one == other):
            return f"{_TOLD.get(name, name)} is {short(one)}"
    return None
