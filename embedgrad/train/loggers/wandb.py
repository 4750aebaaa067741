"""Writes a run's figures for Weights & Biases, offline unless the user sets WANDB_MODE.

Upload an offline log with `wandb sync runs/NAME/wandb/*`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedgrad.train.loggers.scalars import scalars
from embedgrad.train.progress import Quiet
from embedgrad.train.run_folder import read_metrics
from embedgrad.util.errors import SaveError
from embedgrad.util.files import write_atomic


class WeightsAndBiases(Quiet):
    """Logs scalars per step, a histogram of the similarities per token, and alarms in `folder`/wandb.

    Nothing leaves the machine unless the environment variable WANDB_MODE is "online". W&B's own environment variables
    set project, name and tags. Terminal output, code and the state of git are not collected.

    A resumed run has the same W&B id, which is stored in `folder`/wandb/id. W&B writes with a delay, and a killed run
    loses its last records. So the log of a resumed run begins with the records in metrics.jsonl, and offline the newest
    log holds the whole run. Online, W&B ignores steps that it already has; steps that are taken again have the same
    figures.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any]) -> None:
        self._folder, self._description = folder, description
        self._run: Any = None

    def start(self, total: int, done: int) -> None:
        """Opens the log."""
        import wandb

        (self._folder / "wandb").mkdir(parents=True, exist_ok=True)  # else W&B writes to a temporary folder
        mode: Any = os.environ.get("WANDB_MODE") or "offline"  # W&B itself reads the variable once per process
        self._run = wandb.init(
            dir=str(self._folder),
            project=os.environ.get("WANDB_PROJECT", "embedgrad"),
            name=os.environ.get("WANDB_NAME", self._folder.resolve().name),
            id=self._id(),
            resume="allow",
            config=dict(self._description),
            mode=mode,
            settings=wandb.Settings(console="off", silent=mode == "offline", disable_code=True, disable_git=True),
        )
        for record in read_metrics(self._folder)[0] if done else ():
            if record["step"] <= done:
                {"step": self.step, "validation": self.validation, "alarm": self._value}[record["kind"]](record)

    def step(self, record: Mapping[str, Any]) -> None:
        """Logs figures under train/, and the histogram."""
        import wandb

        extra = {"train/similarity": wandb.Histogram(record["similarity"])} if record.get("similarity") else {}
        self._run.log({**scalars(record), **extra}, step=record["step"])

    def validation(self, record: Mapping[str, Any]) -> None:
        """Logs figures under validation/."""
        self._run.log(scalars(record), step=record["step"])

    def alarm(self, record: Mapping[str, Any], sentence: str) -> None:
        """Logs the alarm's value under alarm/, and an alert, which W&B sends if it is online."""
        self._value(record)
        self._run.alert(title=f"embedgrad: {record['sign']}", text=sentence)

    def stop(self) -> None:
        """Closes the log."""
        if self._run is not None:
            self._run.finish()

    def _value(self, record: Mapping[str, Any]) -> None:
        self._run.log({f"alarm/{record['sign']}": record["value"]}, step=record["step"])

    def _id(self) -> str:
        """The run's id at W&B: the id of an earlier session, or a new one. Raises SaveError."""
        file = self._folder / "wandb" / "id"
        try:
            known = file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError):
            known = ""
        if known:
            return known
        made = secrets.token_hex(4)
        try:
            write_atomic(file, f"{made}\n".encode())
        except SaveError as error:
            raise SaveError(f"{error} Without it the W&B run cannot be resumed.") from error
        return made
