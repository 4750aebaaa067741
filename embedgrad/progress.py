"""Who is told how a run is going: a live bar for people, JSON lines for programs, or nobody."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from typing import Any, Protocol, TextIO


class Progress(Protocol):
    """What `optimize` calls. Records are the lines of metrics.jsonl."""

    def start(self, total: int, done: int) -> None:
        """The run takes `total` steps, of which `done` were taken by an earlier session."""

    def step(self, record: Mapping[str, Any]) -> None:
        """One step was taken."""

    def validation(self, record: Mapping[str, Any]) -> None:
        """One validation was made."""

    def alarm(self, record: Mapping[str, Any], sentence: str) -> None:
        """A sign of failure appeared; the record, and what it says."""

    def note(self, text: str) -> None:
        """One sentence for people."""

    def stop(self) -> None:
        """The run is over, for whatever reason."""


class Quiet:
    """Tells nobody."""

    def start(self, total: int, done: int) -> None:
        """Says nothing."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Says nothing."""

    def validation(self, record: Mapping[str, Any]) -> None:
        """Says nothing."""

    def alarm(self, record: Mapping[str, Any], sentence: str) -> None:
        """Says nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""

    def stop(self) -> None:
        """Says nothing."""


class JsonLines(Quiet):
    """Writes one JSON object per line: `{"kind": "start" | "step" | "validation" | "alarm" | "note", ...}`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def start(self, total: int, done: int) -> None:
        """kind "start" with total and done."""
        self._write({"kind": "start", "total": total, "done": done})

    def step(self, record: Mapping[str, Any]) -> None:
        """The record as it is."""
        self._write(record)

    def validation(self, record: Mapping[str, Any]) -> None:
        """The record as it is."""
        self._write(record)

    def alarm(self, record: Mapping[str, Any], sentence: str) -> None:
        """The record with the sentence as its text."""
        self._write({**record, "text": sentence})

    def note(self, text: str) -> None:
        """kind "note" with the text."""
        self._write({"kind": "note", "text": text})

    def _write(self, record: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(dict(record)) + "\n")
        self._stream.flush()


class Several:
    """Tells each of its listeners, in their order."""

    def __init__(self, *listeners: Progress) -> None:
        self._listeners = listeners

    def start(self, total: int, done: int) -> None:
        """Passes it on."""
        for listener in self._listeners:
            listener.start(total, done)

    def step(self, record: Mapping[str, Any]) -> None:
        """Passes it on."""
        for listener in self._listeners:
            listener.step(record)

    def validation(self, record: Mapping[str, Any]) -> None:
        """Passes it on."""
        for listener in self._listeners:
            listener.validation(record)

    def alarm(self, record: Mapping[str, Any], sentence: str) -> None:
        """Passes it on."""
        for listener in self._listeners:
            listener.alarm(record, sentence)

    def note(self, text: str) -> None:
        """Passes it on."""
        for listener in self._listeners:
            listener.note(text)

    def stop(self) -> None:
        """Passes it on, to the others too where one of them raises."""
        with contextlib.ExitStack() as stack:
            for listener in reversed(self._listeners):
                stack.callback(listener.stop)


class Bar:
    """A bar with loss, similarity, rate and time left on stderr; each validation is a line above it.

    Without a terminal there is no bar, only the lines.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True, highlight=False)
        self._bar = RichProgress(
            TextColumn("optimising"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, told="")

    def start(self, total: int, done: int) -> None:
        """Show the bar."""
        self._bar.reset(self._task, total=total, completed=done)
        self._bar.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """Move the bar by one."""
        told = (
            f"loss {record['loss']:.4f}  similarity ≥ {record['similarity_min']:.4f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s"
        )
        self._bar.update(self._task, completed=record["step"], told=told)

    def validation(self, record: Mapping[str, Any]) -> None:
        """A line with the figures."""
        best = "  best so far" if record["best"] else ""
        told = f"step {record['step']}: accuracy {record['accuracy']:.4f}, loss {record['loss']:.4f}"
        if "train_accuracy" in record:
            told += f", training accuracy {record['train_accuracy']:.4f}"
        if (answers := record.get("answers")) is not None:
            told += f"; answers of {answers['tokens']:.1f} tokens, entropy {answers['collapse']:.2f}"
            told += "" if answers["invalid"] is None else f", {answers['invalid']:.0%} invalid"
        self.note(told + best)

    def alarm(self, record: Mapping[str, Any], sentence: str) -> None:
        """A line above the bar, in red."""
        self._console.print(sentence, style="bold red", markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Take the bar away."""
        self._bar.stop()
