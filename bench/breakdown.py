"""Where one of our steps spends its time: by operation, and by frozen matrix, each without what it calls."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

MATRICES = ("qkv", "q", "kv", "out", "gate_up", "down")


class _Stopwatch:
    """Exclusive seconds by name: the time inside a call counts for the innermost name."""

    def __init__(self, finish: Callable[[], Any]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._finish = finish
        self._inner: list[float] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time counts for `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._finish()
            started = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                self._finish()
                spent = time.perf_counter() - started
                self.seconds[name] += spent - self._inner.pop()
                if self._inner:
                    self._inner[-1] += spent

        return call


class _Ops:
    """A backend whose operations are timed."""

    def __init__(self, ops: Any, watch: _Stopwatch) -> None:
        self._ops, self._watch = ops, watch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ops, name)
        return self._watch.timed(name, found) if callable(found) else found


class _Matrix:
    """A frozen matrix whose products are timed."""

    def __init__(self, matrix: Any, name: str, watch: _Stopwatch) -> None:
        self._matrix = matrix
        self.forward = watch.timed(f"{name} forward", matrix.forward)
        self.backward = watch.timed(f"{name} backward", matrix.backward)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._matrix, name)


def breakdown(model: Any, step: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one `step` of `model` by what they are spent on; "other" is all that has no name.

    On a GPU each part waits for the device, so that the parts add up, and to more than an undisturbed step takes.
    """
    import dataclasses

    import torch

    where = model.device
    watch = _Stopwatch((lambda: torch.cuda.synchronize(where)) if where.type == "cuda" else lambda: None)
    decoder, weights = model.decoder, model.weights
    layers = [
        dataclasses.replace(layer, **{name: _Matrix(getattr(layer, name), name, watch) for name in MATRICES})
        for layer in weights.layers
    ]
    timed = dataclasses.replace(weights, layers=layers, head=_Matrix(weights.head, "head", watch))
    before = model.ops, decoder.ops, model.weights, decoder.weights
    try:
        model.ops = decoder.ops = _Ops(model.ops, watch)
        model.weights = decoder.weights = timed
        watch.timed("other", step)()
    finally:
        model.ops, decoder.ops, model.weights, decoder.weights = before
    return dict(sorted(watch.seconds.items(), key=lambda item: -item[1]))
