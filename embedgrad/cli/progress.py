"""Shows the progress of a run: a live bar for people, JSON lines for programs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from embedgrad.train.progress import Quiet
from embedgrad.util.shown import visible


class JsonLines(Quiet):
    """Writes one JSON object per line: `{"kind": "start" | "step" | "validation" | "alarm" | "note", ...}`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def start(self, total: int, done: int) -> None:
        """Writes kind "start" with `total` and `done`."""
        self._write({"kind": "start", "total": total, "done": done})

    def step(self, record: Mapping[str, Any]) -> None:
        """Writes the record."""
        self._write(record)

    def validation(self, record: Mapping[str, Any]) -> None:
        """Writes the record."""
        self._write(record)

    def alarm(self, record: Mapping[str, Any], sentence: str) -> None:
        """Writes the record, with the sentence as "text"."""
        self._write({**record, "text": sentence})

    def note(self, text: str) -> None:
        """Writes kind "note" with the text."""
        self._write({"kind": "note", "text": text})

    def _write(self, record: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(dict(record)) + "\n")
        self._stream.flush()


class Bar:
    """A progress bar on stderr with loss, similarity, tokens per second and time left.

    Each validation prints a line above the bar. Without a terminal there are only these lines. A terminal that was
    closed ends the bar and not the run.
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
        """Shows the bar."""
        self._bar.reset(self._task, total=total, completed=done)
        with contextlib.suppress(OSError):
            self._bar.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """Updates the bar."""
        told = (
            f"loss {record['loss']:.4f}  similarity ≥ {record['similarity_min']:.4f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s"
        )
        with contextlib.suppress(OSError):
            self._bar.update(self._task, completed=record["step"], told=told)

    def validation(self, record: Mapping[str, Any]) -> None:
        """Prints a line with the validation's figures."""
        best = "  best so far" if record["best"] else ""
        told = f"step {record['step']}: accuracy {record['accuracy']:.4f}, loss {record['loss']:.4f}"
        if "train_accuracy" in record:
            told += f", training accuracy {record['train_accuracy']:.4f}"
        if (answers := record.get("answers")) is not None:
            told += f"; answers of {answers['tokens']:.1f} tokens, entropy {answers['collapse']:.2f}"
            told += "" if answers["invalid"] is None else f", {answers['invalid']:.0%} invalid"
        self.note(told + best)

    def alarm(self, record: Mapping[str, Any], sentence: str) -> None:
        """Prints the sentence in red above the bar."""
        self._print(sentence, "bold red")

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._print(text)

    def stop(self) -> None:
        """Removes the bar."""
        with contextlib.suppress(OSError):
            self._bar.stop()

    def _print(self, text: str, style: str | None = None) -> None:
        with contextlib.suppress(OSError):
            self._console.print(visible(text), style=style, markup=False, soft_wrap=True)
