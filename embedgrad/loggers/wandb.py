"""A run's figures for Weights & Biases, offline unless the user has set WANDB_MODE: `wandb sync runs/NAME/wandb/*`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedgrad.errors import SaveError
from embedgrad.files import write_atomic
from embedgrad.loggers import scalars
from embedgrad.progress import Quiet
from embedgrad.runs import read_metrics


class WeightsAndBiases(Quiet):
    """Logs scalars per step, the similarities per token as a histogram, and alarms, below `folder`/wandb.

    Nothing leaves the machine unless the environment says WANDB_MODE=online; other settings (project, name, tags) are
    W&B's own variables. What the terminal shows, code and the state of git are not collected. A resumed run has the
    same W&B id, kept in `folder`/wandb/id. Its new log begins with what metrics.jsonl says of the steps that were
    taken, because W&B writes with delay and a kill takes the last of it; so offline the newest log is the whole run.
    Online, W&B leaves out steps that it has seen; those that are taken again have the same figures.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any]) -> None:
        self._folder, self._description = folder, description
        self._run: Any = None

    def start(self, total: int, done: int) -> None:
        """Open the log."""
        import wandb

        (self._folder / "wandb").mkdir(parents=True, exist_ok=True)  # else W&B writes to a temporary folder
        mode: Any = os.environ.get("WANDB_MODE") or "offline"  # W&B itself reads it once per process
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
        """Figures under train/, and the histogram."""
        import wandb

        extra = {"train/similarity": wandb.Histogram(record["similarity"])} if record.get("similarity") else {}
        self._run.log({**scalars(record), **extra}, step=record["step"])

    def validation(self, record: Mapping[str, Any]) -> None:
        """Figures under validation/."""
        self._run.log(scalars(record), step=record["step"])

    def alarm(self, record: Mapping[str, Any], sentence: str) -> None:
        """The alarm's value under alarm/, and an alert where W&B is online."""
        self._value(record)
        self._run.alert(title=f"embedgrad: {record['sign']}", text=sentence)

    def stop(self) -> None:
        """Close the log."""
        if self._run is not None:
            self._run.finish()

    def _value(self, record: Mapping[str, Any]) -> None:
        self._run.log({f"alarm/{record['sign']}": record["value"]}, step=record["step"])

    def _id(self) -> str:
        """This run's id at W&B: the one it was given in an earlier session, or a new one."""
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
