"""Seconds of Python by what they are spent on: the part of a step, and what is called in it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

REST = ""


class Stopwatch:
    """Seconds by (part, name). Time inside a nested call counts for the inner call only."""

    def __init__(
        self, finish: Callable[[], Any] = lambda: None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """finish: what waits for the work that a call has started. clock: gives seconds."""
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._finish, self._clock = finish, clock
        self._inner: list[float] = []
        self._parts = [REST]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time counts for `name` in the part in which it is called."""
        return self._watched(function, lambda: (self._parts[-1], name), opens=False)

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which is the part `name`; its own time has the name REST."""
        return self._watched(function, lambda: (name, REST), opens=True)

    def _watched(
        self, function: Callable[..., Any], key: Callable[[], tuple[str, str]], *, opens: bool
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._finish()
            named = key()
            if opens:
                self._parts.append(named[0])
            self._inner.append(0.0)
            started = self._clock()
            try:
                return function(*args, **kwargs)
            finally:
                self._finish()
                spent = self._clock() - started
                self.seconds[named] += spent - self._inner.pop()
                if self._inner:
                    self._inner[-1] += spent
                if opens:
                    self._parts.pop()

        return call


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `owner.name` is `value`."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
