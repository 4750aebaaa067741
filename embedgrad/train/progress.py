"""Listeners that `optimize` informs about the progress of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Protocol


class Progress(Protocol):
    """The interface of a listener. Records are those of metrics.jsonl."""

    def start(self, total: int, done: int) -> None:
        """The run begins or is resumed. It has `total` steps; earlier sessions have taken `done` of them."""

    def step(self, record: Mapping[str, Any]) -> None:
        """A step has been taken."""

    def validation(self, record: Mapping[str, Any]) -> None:
        """A validation has been made."""

    def alarm(self, record: Mapping[str, Any], sentence: str) -> None:
        """An alarm has gone off. `sentence` describes it for people."""

    def note(self, text: str) -> None:
        """A sentence for people."""

    def stop(self) -> None:
        """The run has ended, for whatever reason."""


class Quiet:
    """A listener that does nothing."""

    def start(self, total: int, done: int) -> None:
        """Does nothing."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Does nothing."""

    def validation(self, record: Mapping[str, Any]) -> None:
        """Does nothing."""

    def alarm(self, record: Mapping[str, Any], sentence: str) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def stop(self) -> None:
        """Does nothing."""


class Forwarding:
    """A listener that hands each call to `forward`, by the method's name."""

    def forward(self, method: str, *arguments: Any) -> None:
        """Forwards a call."""
        raise NotImplementedError

    def start(self, total: int, done: int) -> None:
        """Forwards the call."""
        self.forward("start", total, done)

    def step(self, record: Mapping[str, Any]) -> None:
        """Forwards the call."""
        self.forward("step", record)

    def validation(self, record: Mapping[str, Any]) -> None:
        """Forwards the call."""
        self.forward("validation", record)

    def alarm(self, record: Mapping[str, Any], sentence: str) -> None:
        """Forwards the call."""
        self.forward("alarm", record, sentence)

    def note(self, text: str) -> None:
        """Forwards the call."""
        self.forward("note", text)

    def stop(self) -> None:
        """Forwards the call."""
        self.forward("stop")


class Several(Forwarding):
    """A listener that forwards each call to several listeners, in their order."""

    def __init__(self, *listeners: Progress) -> None:
        self._listeners = listeners

    def forward(self, method: str, *arguments: Any) -> None:
        """Calls all listeners."""
        for listener in self._listeners:
            getattr(listener, method)(*arguments)

    def stop(self) -> None:
        """Calls all listeners, also where one raises an error."""
        with contextlib.ExitStack() as stack:
            for listener in reversed(self._listeners):
                stack.callback(listener.stop)
