"""Ctrl-C, SIGTERM and SIGHUP as a request that the program fulfils at a moment of its own choice."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_HANG_UP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has no such signal
_REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", _HANG_UP: "hung up"}
REASONS = ("interrupted", "terminated", "hung up")
"""Why a run stopped that can be resumed: SIGINT, SIGTERM, SIGHUP."""


class StopRequest:
    """Whether a signal has asked the program to stop. reason: one of REASONS, or None."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.reason is not None


class Stopped(Exception):
    """A signal stopped work that the same command continues. reason: one of REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@contextlib.contextmanager
def stop_on_signals(terminate: bool, once: bool = True) -> Iterator[StopRequest]:
    """Inside the block the first SIGINT (with `terminate` also SIGTERM and SIGHUP) only sets the request.

    SIGHUP stays ignored where it is, as under nohup.

    With `once` the first signal also restores the previous handlers, so that a second signal acts at once. A launcher
    of several processes sends its signals more than once, and kills what does not end. Python allows signal handlers in
    the main thread only; in other threads the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.reason = _REASONS[signal.Signals(number)]
        if once:
            restore()

    try:
        for number in _caught(terminate):
            before[number] = signal.signal(number, note)
        yield request
    finally:
        restore()


def _caught(terminate: bool) -> list[signal.Signals]:
    found = [signal.SIGINT, *([signal.SIGTERM] if terminate else [])]
    if terminate and _HANG_UP is not None and signal.getsignal(_HANG_UP) is not signal.SIG_IGN:
        found.append(_HANG_UP)
    return found


@contextlib.contextmanager
def interruptible() -> Iterator[StopRequest]:
    """Inside the block Ctrl-C sets the request instead of raising KeyboardInterrupt.

    Where the program has installed a handler of its own, that handler stays and the request is never set.
    """
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    with stop_on_signals(terminate=False) as request:
        yield request
