"""The budget of a rendering: how much a chat template may compute, how large its values are, how long it takes.

Every operation costs units, and what walks over a value costs more the longer the value is. The number of units
decides, so that a template is refused on every machine or on none. The clock is there for what the units misjudge.
"""

from __future__ import annotations

import threading
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from jinja2.runtime import LoopContext

STEP = 20  # units for one iteration of a loop or one call
LOOK_UP = 5  # units for one attribute or item
ITEM = 8  # characters that an item of a list counts as, in addition to its own
BITS = 4096  # of the largest integer
SECONDS = 2.5  # of one core, for one rendering; compiling a template takes at most two more (`MAX_NODES` in sandbox)
_WALKED = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class Refused(Exception):
    """A template exceeded its budget or used something that is not allowed."""


class Budget(threading.local):
    """The budget of a rendering, per thread. units: what is left of it. largest: characters of the largest value."""

    units = 0
    largest = 0
    _processor = 0.0  # this thread's seconds at the beginning
    _look = 0.0  # when to look at them again

    def begin(self, length: int) -> None:
        """Starts a rendering. Both limits grow with the number of characters of the conversation, `length`."""
        self.units = (1 << 22) + 64 * length
        self.largest = (1 << 20) + 4 * length
        self._processor, self._look = time.thread_time(), time.perf_counter() + SECONDS

    def spend(self, units: int) -> None:
        """Subtracts `units`. Raises Refused where too few are left, or where the time is over."""
        self.units -= units
        if self.units < 0 or (time.perf_counter() > self._look and not self._time_left()):
            raise Refused("it runs for too long or writes too much text")

    def _time_left(self) -> bool:
        """Whether this thread has computed for less than SECONDS; if so, when it may have done so at the earliest."""
        left = SECONDS - (time.thread_time() - self._processor)
        self._look = time.perf_counter() + left
        return left > 0

    def check(self, size: int) -> None:
        """Raises Refused for a value of more than `largest` characters."""
        if size > self.largest:
            raise Refused(f"it makes a value of more than {self.largest:,} characters")

    def measure(self, value: Any) -> int:
        """The size of `value` in characters, checked and paid for.

        An item that a nested value contains several times counts several times, as it would be written. A range counts
        as the list of its numbers.
        """
        if isinstance(value, str):
            self.check(len(value))
            self.spend(len(value) >> 2)
            return len(value)
        total, stack = 0, [value]
        while stack:
            item = stack.pop()
            total += ITEM
            if isinstance(item, str):
                total += len(item)
            elif isinstance(item, int):
                check_bits(item.bit_length())
            elif isinstance(item, range):
                total += ITEM * len(item)
            elif isinstance(item, Mapping):
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, _WALKED):
                stack.extend(item)
            self.check(total)
        self.spend(total)
        return total

    def walked(self, value: Any) -> Any:
        """`value`, paid for as something that is walked over from one end to the other."""
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self.counted(value, STEP)
        self.measure(value)
        return value

    def counted(self, values: Iterable[Any], cost: int) -> Iterator[Any]:
        """`values`, each of which costs `cost` units."""
        for value in values:
            self.spend(cost)
            yield value

    def pairs(self, one: int, other: int) -> None:
        """Pays for up to `one` · `other` comparisons of characters, several hundred of which are made in a unit."""
        self.spend(one * other >> 8)


def check_bits(bits: int) -> None:
    """Raises Refused for an integer of more than BITS bits."""
    if bits > BITS:
        raise Refused(f"it computes with integers of more than {BITS:,} bits")
