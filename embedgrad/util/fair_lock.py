"""A re-entrant lock that lets a waiting thread in before the thread that has just released it."""

from __future__ import annotations

import threading


class FairLock:
    """Like `threading.RLock`, but a thread that releases it and takes it again comes after a thread that waits."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._gate = threading.Lock()  # held by the next thread while it waits; the others queue behind it
        self._owner: int | None = None
        self._depth = 0

    @property
    def wanted(self) -> bool:
        """Whether a thread waits for the lock."""
        return self._gate.locked()

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._owner == me:
            self._lock.acquire()
        else:
            with self._gate:
                self._lock.acquire()
        self._owner = me
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()
