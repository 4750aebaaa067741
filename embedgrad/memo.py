"""Values remembered for as long as the object they belong to lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class PerObject(Generic[Value]):
    """A cache of values by (object, key). Objects are told apart by identity and are not kept alive; each has at most
    `limit` keys, the oldest leave first. Values must not refer to their object."""

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._values: dict[int, tuple[weakref.ref[object], dict[Hashable, Value]]] = {}

    def get(self, owner: object, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value for (owner, key), made by `make()` on first use; nothing is kept when `make` raises."""
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
