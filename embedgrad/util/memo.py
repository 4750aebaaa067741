"""A cache whose values live as long as the object they belong to."""

from __future__ import annotations

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

    def get(self, owner: object, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value for (owner, key), made by `make()` on first use. Nothing is stored when `make` raises."""
        number = id(owner)
        entry = self._values.get(number)
        if entry is None or entry[0]() is not owner:
            entry = (weakref.ref(owner, lambda _: self._values.pop(number, None)), {})
            self._values[number] = entry
        values = entry[1]
        if key in values:
            return values[key]
        value = make()
        while len(values) >= self._limit:
            values.pop(next(iter(values)), None)
        values[key] = value
        return value
