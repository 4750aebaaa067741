"""The rows that every question records: what was asked, of whom, what came out, and where.

One row is one figure of one contender in one case. Rows are appended to `bench/results/QUESTION.jsonl`, one JSON object
a line. Tables and pictures are made from them alone (`bench.harness.report`).
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
LOW, HIGH = 0.2, 0.8  # quantiles beside the median


class Machine(BaseModel):
    """Where a run took place."""

    model_config = ConfigDict(frozen=True)

    cpu: str
    instruction_set: str  # what the native backend uses; empty: unknown
    cores: int
    memory_bytes: int | None  # None: unknown
    gpu: str | None
    system: str

    def __str__(self) -> str:
        told = f" ({self.instruction_set})" if self.instruction_set else ""
        parts = [f"{self.cores} cores of {self.cpu}{told}"]
        if self.memory_bytes is not None:
            parts.append(f"{self.memory_bytes / 2**30:.0f} GiB")
        return ", ".join(parts if self.gpu is None else [self.gpu, *parts])


class Run(BaseModel):
    """One call of `python -m bench`."""

    model_config = ConfigDict(frozen=True)

    started: str  # UTC
    command: str
    commit: str  # with a "+" where the working tree differed from it
    quick: bool
    versions: dict[str, str]
    machine: Machine


class Row(BaseModel):
    """One figure.

    median, low, high: of the `repeats` values measured, in `unit`; low and high are the 20 and 80 % quantiles.
    repeats 0: counted or computed, not measured. peak_bytes: memory, where that was asked. more: other figures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str
    contender: str
    version: str
    case: dict[str, int | float | str]
    unit: str
    median: float
    low: float
    high: float
    repeats: int
    peak_bytes: int | None = None
    more: dict[str, Any] = Field(default_factory=dict)
    run: Run | None = None


def row(
    question: str,
    contender: str,
    version: str,
    values: Sequence[float],
    *,
    case: Mapping[str, int | float | str],
    unit: str = "s",
    peak_bytes: int | None = None,
    counted: bool = False,
    **more: Any,
) -> Row:
    """A row of the `values` measured; with `counted`, of one value that was counted."""
    return Row(
        question=question, contender=contender, version=version, case=dict(case), unit=unit,
        median=statistics.median(values), low=quantile(values, LOW), high=quantile(values, HIGH),
        repeats=0 if counted else len(values), peak_bytes=peak_bytes, more=more,
    )  # fmt: skip


def of_part(rows: Iterable[Row], part: str) -> list[Row]:
    """The rows of one part of a question."""
    return [one for one in rows if one.case["part"] == part]


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie; between two neighbours, linear interpolation."""
    found = sorted(values)
    place = share * (len(found) - 1)
    below = int(place)
    above = min(below + 1, len(found) - 1)
    return found[below] + (place - below) * (found[above] - found[below])


def this_run(arguments: Sequence[str], quick: bool) -> Run:
    """The run that these command-line arguments have started."""
    import torch
    import triton

    import embedgrad

    versions = {
        "embedgrad": embedgrad.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    return Run(
        started=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=" ".join(["python -m bench", *arguments]), commit=_commit(), quick=quick, versions=versions,
        machine=_machine(),
    )  # fmt: skip


def append(rows: Iterable[Row]) -> list[Path]:
    """Append rows to their questions' files; returns the files."""
    RESULTS.mkdir(exist_ok=True)
    lines: dict[Path, str] = {}
    for one in rows:
        path = RESULTS / f"{one.question}.jsonl"
        lines[path] = lines.get(path, "") + one.model_dump_json() + "\n"
    for path, text in lines.items():
        with path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    return list(lines)


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file. ValueError, which names the line, where one is no row."""
    if not path.exists():
        return []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(Row.model_validate_json(line))
            except ValidationError as error:
                problem = error.errors()[0]
                at = ".".join(map(str, problem["loc"])) or "the line"
                raise ValueError(f"line {number} of {path} is no row of a benchmark: {at}: {problem['msg']}.") from None
    return rows


def card_of(rows: Iterable[Row]) -> str | None:
    """The GPU that rows of one run were measured on; None: none, whatever the machine has."""
    return next((one.run.machine.gpu for one in rows if one.run and one.case.get("device") == "cuda"), None)


def runs(question: str, folder: Path | None = None) -> list[list[Row]]:
    """The rows of a question by run, from the first on; without `--quick` runs, unless all were quick."""
    by_run: dict[str, list[Row]] = {}
    for one in read((RESULTS if folder is None else folder) / f"{question}.jsonl"):
        by_run.setdefault("" if one.run is None else one.run.model_dump_json(), []).append(one)
    found = list(by_run.values())
    return [rows for rows in found if rows[0].run is not None and not rows[0].run.quick] or found


def newest(question: str, folder: Path | None = None, card: str | None = None) -> list[Row]:
    """The rows of a question's last run on a CPU, or on the GPU `card`, that was not `--quick`.

    Where it is asked of model files, each file has the rows of the last run that measured it.
    """
    found: list[Row] = []
    for rows in reversed(runs(question, folder)):
        files = {_file(one) for one in found}
        if card_of(rows) == card and (not found or None not in files):
            found += [one for one in rows if not files or _file(one) not in (*files, None)]
    return found


def _file(one: Row) -> tuple[object, object] | None:
    """The model file of a row, where rows name the file's types."""
    return (one.case["model"], one.case["types"]) if "types" in one.case else None


def cards(question: str, folder: Path | None = None) -> list[str]:
    """The GPUs that a question has rows of, the one of the last run first."""
    found = (card_of(rows) for rows in reversed(runs(question, folder)))
    return list(dict.fromkeys(card for card in found if card is not None))


def take(path: Path) -> list[Path]:
    """Append rows that were measured elsewhere, but those that are there already; returns the files.

    Raises ValueError, before anything is written, where `path` does not hold rows that say where they come from.
    """
    given = read(path)
    if not given:
        raise ValueError(f"{path} holds no rows; give the gpu.jsonl that `python -m bench gpu` has written.")
    if any(one.run is None for one in given):
        raise ValueError(f"{path} has rows that do not say which run they come from; only whole rows are taken.")
    for name in {one.question for one in given}:
        if not (ROOT / "bench" / f"{name}.py").is_file() or not name.isidentifier():
            raise ValueError(f"{path} names the question {name!r}, which is none of `python -m bench`.")
    known = {one for name in {one.question for one in given} for one in _lines(RESULTS / f"{name}.jsonl")}
    return append(one for one in given if one.model_dump_json() not in known)


def _lines(path: Path) -> set[str]:
    return {one.model_dump_json() for one in read(path)}


def _commit() -> str:
    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=ROOT / "bench", capture_output=True, text=True, check=False)
        return found.stdout.strip()

    # Results, pictures and documents do not change what is measured.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results", ":!pictures", ":/!*.md")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if changed else "")


def _machine() -> Machine:
    import torch

    try:
        from embedgrad.backends import native

        instruction_set = native.instruction_set()
    except ImportError:
        instruction_set = "csrc/ not built"
    return Machine(
        cpu=_cpu(), instruction_set=instruction_set, cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.machine()}",
    )  # fmt: skip


def _cpu() -> str:
    try:
        found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M))
    except OSError:
        return platform.processor() or "unknown"
    name = re.sub(r"\s+", " ", found.get("model name", "unknown"))
    return f"{name} family {found.get('cpu family', '?')} model {found.get('model', '?')}"
