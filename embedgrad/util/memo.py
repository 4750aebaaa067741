"""A cache whose values live as long as the object they belong to."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class PerObject(Generic[Value]):
    """A cache of values by (object, key).

    Objects are compared by identity and are held by weak references. An object has at most `limit` keys; the oldest
    key is dropped first. A value must not refer to its object, which would keep the object alive.
    """

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._values: dict[int, tuple[weakref.ref[object], dict[Hashable, Value]]] = {}
        self._lock = threading.Lock()

    def get(self, owner: object, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value for (owner, key), made by `make()` on first use. Nothing is stored when `make` raises.

        Threads that ask at the same time may each make a value; all of them get the first one that is stored.
        """
        with self._lock:
            values = self._of(owner)
            if key in values:
                return values[key]
        value = make()
        with self._lock:
            if key in values:
                return values[key]
            while len(values) >= self._limit:
                del values[next(iter(values))]
            values[key] = value
            return value

    def _of(self, owner: object) -> dict[Hashable, Value]:
        number = id(owner)
        entry = self._values.get(number)
        if entry is None or entry[0]() is not owner:
            # Without the lock: the garbage collector may call it while this thread holds the lock.
            entry = (weakref.ref(owner, lambda _: self._values.pop(number, None)), {})
            self._values[number] = entry
        return entry[1]
