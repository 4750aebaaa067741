"""Writes a run's figures as TensorBoard event files. View them with `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embedgrad.train.loggers.scalars import scalars
from embedgrad.train.progress import Quiet


class TensorBoard(Quiet):
    """Writes scalars, a histogram of the similarities per token, and alarms as text into `folder`.

    A resumed run uses the same folder; values of earlier sessions for steps that are taken again are removed. Each
    record is flushed before the run continues, so that a killed run loses no record of a step before its checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def start(self, total: int, done: int) -> None:
        """Opens the log, and hides values that earlier sessions wrote after step `done`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=done + 1 if done else None)

    def step(self, record: Mapping[str, Any]) -> None:
        """Writes scalars under train/, and the histogram."""
        self._scalars(record)
        if record.get("similarity"):
            self._writer.add_histogram("train/similarity", np.asarray(record["similarity"]), record["step"])
        self._writer.flush()

    def validation(self, record: Mapping[str, Any]) -> None:
        """Writes scalars under validation/."""
        self._scalars(record)
        self._writer.flush()

    def alarm(self, record: Mapping[str, Any], sentence: str) -> None:
        """Writes the sentence as text."""
        self._writer.add_text("alarm", sentence, record["step"])
        self._writer.flush()

    def stop(self) -> None:
        """Closes the log."""
        if self._writer is not None:
            self._writer.close()

    def _scalars(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])
