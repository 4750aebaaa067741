"""The run folder: config.yaml, metrics.jsonl, checkpoints/, prompt.safetensors (the best prompt), summary.json.

    with RunFolder.open("runs/demo", resume="auto") as folder: ...

locks the folder for this process until the block ends.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import yaml

from embedgrad.train.checkpoints import RunState, checkpoints, load_latest, save_state, step_of
from embedgrad.util.errors import ConfigError, SaveError
from embedgrad.util.files import write_atomic
from embedgrad.util.folder_lock import lock
from embedgrad.util.shown import short

Resume = bool | Literal["auto"]
_PROBES = 4  # checkpoints for which a run needs space: two that are kept, one that is being written, and the prompt


@dataclass(frozen=True)
class Found:
    """What a folder holds of an earlier session: the newest usable checkpoint, its records, what is wrong with newer
    ones."""

    state: RunState | None
    records: list[dict[str, Any]]
    problems: list[str]


class RunFolder:
    """The files of a run. Made by `open`. Where a file cannot be written, a SaveError names it."""

    def __init__(self, path: Path, held: BinaryIO) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock = held
        self._metrics: BinaryIO | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], resume: Resume = False) -> RunFolder:
        """Makes or opens the folder and locks it.

        resume: False: the folder must hold no run. True: it must hold a run. "auto": both are accepted. Raises
        ConfigError where the folder does not fit `resume` or another process uses it, and SaveError where it cannot be
        made or locked.
        """
        path = Path(path)
        try:
            if resume is True and not holds_run(path):
                raise ConfigError(f"there is no run to resume in {path}; start it without resume.")
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(f"cannot write to the run folder {path}: {error.strerror or error}.") from error
        folder = cls(path, lock(path))
        if resume is False and holds_run(path):
            folder.close()
            raise ConfigError(f"{path} already holds a run: resume it, choose another name, or remove the folder.")
        for left_over in (*path.glob(".*.tmp"), *folder.checkpoints.glob(".*.tmp")):  # of a process that was killed
            with contextlib.suppress(OSError):
                left_over.unlink()
        return folder

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unlocks the folder. A second call does nothing."""
        if self._metrics is not None:
            with contextlib.suppress(OSError):
                self._metrics.close()
            self._metrics = None
        self._lock.close()

    def probe(self, checkpoint_bytes: int) -> None:
        """Raises SaveError where there is too little disk space for a run with checkpoints of `checkpoint_bytes`."""
        probe = self.path / "probe"
        try:
            write_atomic(probe, b"\0" * (_PROBES * checkpoint_bytes + 2**16))
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    def load_state(self) -> tuple[RunState | None, list[str]]:
        """(newest usable checkpoint or None, what is wrong with newer ones).

        Raises ConfigError where there are checkpoints but none can be used.
        """
        records, _ = read_metrics(self.path)
        state, problems = load_latest(self.checkpoints, len(records))
        if state is None and checkpoints(self.checkpoints):
            raise ConfigError(f"the run in {self.path} cannot be resumed: {' '.join(problems)}")
        return state, problems

    def find(self) -> Found:
        """What an earlier session has left. Raises ConfigError where there are checkpoints but none can be used."""
        state, problems = self.load_state()
        return Found(state, [] if state is None else self.records(state.lines), problems)

    def save_state(self, state: RunState) -> None:
        """Writes a checkpoint, after a sync of metrics.jsonl, on whose lines the checkpoint depends."""
        if self._metrics is not None:
            with _saving(self.path / "metrics.jsonl"):
                os.fsync(self._metrics.fileno())
        save_state(self.checkpoints, state)

    def cut_back_to(self, state: RunState) -> None:
        """Removes what was written after `state`: lines of metrics.jsonl and checkpoints, which were not usable."""
        _, ends = read_metrics(self.path)
        path = self.path / "metrics.jsonl"
        if path.exists():
            with _saving(path):
                os.truncate(path, ends[state.lines - 1] if state.lines else 0)
        for checkpoint in checkpoints(self.checkpoints):
            if step_of(checkpoint) > state.step:
                with contextlib.suppress(OSError):
                    checkpoint.unlink()

    def records(self, lines: int) -> list[dict[str, Any]]:
        """The first `lines` records of metrics.jsonl."""
        return read_metrics(self.path)[0][:lines]

    def append(self, record: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        with _saving(path):
            if self._metrics is None:
                self._metrics = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
            line = json.dumps(record).encode() + b"\n"
            written = self._metrics.write(line)
            if written != len(line):
                raise OSError(None, "no space left for the whole line")

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Writes config.yaml, the settings of the run."""
        text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
        write_atomic(self.path / "config.yaml", text.encode())

    def write_summary(self, values: Mapping[str, Any]) -> None:
        """Writes summary.json, the results of the run."""
        write_summary(self.path, values)


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """(records of metrics.jsonl in a run folder, for each the offset in bytes at which its line ends).

    Reading stops before the first line that is incomplete or not a record: a JSON object with a text `kind` and a whole
    number `step`. Raises ConfigError where the file cannot be read.
    """
    try:
        data = (path / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise ConfigError(f"cannot read {path / 'metrics.jsonl'}: {error.strerror or error}.") from error
    records: list[dict[str, Any]] = []
    ends: list[int] = []
    position = 0
    for line in data.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not _is_record(record):
            break
        position += len(line) + 1
        records.append(record)
        ends.append(position)
    return records, ends


def _is_record(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        return False
    step = value.get("step")
    return isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 1 << 53


def holds_run(path: Path) -> bool:
    """Whether the folder holds a run or the rest of one."""
    known = ("config.yaml", "metrics.jsonl", "summary.json", "prompt.safetensors")
    return any((path / name).exists() for name in known) or bool(checkpoints(path / "checkpoints"))


@contextlib.contextmanager
def _saving(path: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"cannot write {path}: {error.strerror or error}; free some space and resume the run."
        ) from error


def read_summary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values in a run folder's summary.json. Raises ConfigError where it cannot be read."""
    file = Path(path) / "summary.json"
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {file}: {short(str(error))}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} does not hold a JSON object.")
    return values


def write_summary(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Writes a run folder's summary.json, whole or not at all. Raises SaveError."""
    write_atomic(Path(path) / "summary.json", (json.dumps(dict(values), indent=2) + "\n").encode())
