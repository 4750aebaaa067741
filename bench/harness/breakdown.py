"""Where a step spends its time: by operation and by frozen matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from bench.harness.stopwatch import Stopwatch

MATRICES = ("qkv", "q", "kv", "out", "gate_up", "down")


class _TimedOps:
    """A backend whose operations are timed."""

    def __init__(self, ops: Any, watch: Stopwatch) -> None:
        self._ops, self._watch = ops, watch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ops, name)
        return self._watch.timed(name, found) if callable(found) and not name.endswith("_bytes") else found


class _TimedMatrix:
    """A frozen matrix whose products are timed."""

    def __init__(self, matrix: Any, name: str, watch: Stopwatch) -> None:
        self._matrix = matrix
        self.forward = watch.timed(f"{name} forward", matrix.forward)
        self.backward = watch.timed(f"{name} backward", matrix.backward)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._matrix, name)


def breakdown(model: Any, step: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one `step` of `model` by what they are spent on; "other" is what has no name.

    On a GPU the host waits for the device after each part. So the parts add up, and the step takes longer than usual.
    """
    from embedgrad.engine.decoder import Decoder

    where = model.device
    watch = Stopwatch((lambda: torch.cuda.synchronize(where)) if where.type == "cuda" else lambda: None)
    layers = [
        dataclasses.replace(layer, **{name: _TimedMatrix(getattr(layer, name), name, watch) for name in MATRICES})
        for layer in model.weights.layers
    ]
    before = model.ops, model.weights, model.decoder
    try:
        model.ops = _TimedOps(model.ops, watch)
        model.weights = dataclasses.replace(
            model.weights, layers=layers, head=_TimedMatrix(model.weights.head, "head", watch)
        )
        model.decoder = Decoder(model.config, model.weights, model.ops, model.dtype, model.arena)
        watch.timed("other", step)()
    finally:
        model.ops, model.weights, model.decoder = before
    return dict(sorted(((name, spent) for (_, name), spent in watch.seconds.items()), key=lambda item: -item[1]))
