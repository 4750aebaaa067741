"""What does an NVIDIA GPU make of it: is everything right, and how fast are steps, answers and operations?

For anyone with a GPU; no network and no model file is needed, since the models have random weights in the shapes of
Qwen2.5-Math. The sections that tell most come first: tests and every kernel in every type, ceilings, steps
beside PEFT, transformers and the floor, answers, profiles, loss, attention, products with quantised weights, row-wise
operations, other policies, weights and models. Each is a process of its own with a time limit. What is not installed is
left out with a line, what fails is named with its error, and the next goes on. After each section the rows so far are
written as DIR/gpu.jsonl and the page as DIR/gpu.md, whole. `python -m bench report --take DIR/gpu.jsonl` brings rows
that were measured elsewhere into bench/results.

`--rehearse` goes through everything with tiny sizes in Triton's interpreter, without a GPU. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.harness.arguments import folder, minutes
from bench.harness.clock import device
from bench.harness.markdown import table
from bench.harness.rows import Row, Run, this_run
from bench.on_gpu import attention, ceilings, correct, decoding, losses, profiles, quantized, row_wise, steps
from bench.on_gpu.device import Device, Rehearsal
from bench.on_gpu.section import FULL, Bench, Section, installed, tiny
from bench.on_gpu.show import of_cards
from embedgrad.util.files import write_atomic

CHECKS = ()  # its first sections are the checks, so that a card on which some fail is measured all the same
HISTORY = True  # rows of all runs count, so that before and after stand side by side
SECTIONS = (
    correct.TESTS, correct.SECTION, ceilings.SECTION, steps.SECTION, decoding.SECTION, profiles.SECTION, losses.SECTION,
    attention.SECTION, quantized.SECTION, row_wise.SECTION, row_wise.SMALL, steps.MORE,
)  # fmt: skip
TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    **{one.name: one.table for one in SECTIONS if one is not steps.MORE}, "decode profile": decoding.PROFILES
}  # fmt: skip
LEAST = 5.0  # seconds without which no section begins
SLACK = 3.0  # times its cost that a section may take

Note = str
Found = tuple[list[Row], list[Note]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    names = [one.name for one in SECTIONS]
    parser.add_argument("--minutes", type=minutes, default=10.0, help="no section goes on after so long (default 10)")
    parser.add_argument("--out", type=folder, default=Path("gpu-results"), metavar="DIR", help="default: gpu-results")
    parser.add_argument("--sections", nargs="*", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rehearse", action="store_true", help="tiny and interpreted, without a GPU; records nothing")
    parser.add_argument("--worker", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # seconds of time.time()


def main(args: argparse.Namespace) -> list[Row]:
    """Measure; the rows."""
    if args.rehearse:
        args.unrecorded = True
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        device("cuda")
        os.environ["TRITON_INTERPRET"] = "0"
    if args.worker:
        section = next(one for one in SECTIONS if one.name == args.worker)
        bench = Bench(Rehearsal(), tiny()) if args.rehearse else Bench(Device(), FULL)
        bench.until, bench.threads = args.until, max(1, len(os.sched_getaffinity(0)) - 2)
        for line in measured(section, bench, args.until):
            print(json.dumps(line), flush=True)
        return []
    run = getattr(args, "run", None) or this_run(["gpu"], args.quick)
    chosen = [one for one in SECTIONS if one.name in args.sections]
    if args.quick:
        chosen = [one for one in chosen if one.cost <= 60]
    return ask_sections(chosen, args.minutes * 60, args.out, run, lambda one, until: _ask(one, until, args.rehearse))


def measured(section: Section, bench: Bench, until: float) -> Iterator[dict[str, Any]]:
    """What a section's jobs give, as they give it: {"row": …}, or {"note": …} about one that gave none."""
    jobs = section.jobs(bench)
    while True:
        try:
            job = next(jobs, None)
        except Exception as error:
            yield {"note": f"{section.name} ended early: {_told(error)}"}
            return
        if job is None:
            return
        lacks = next((name for name in job.needs if installed(name) is None), None)
        if lacks is not None:
            yield {"note": f"{job.name}: left out, {lacks} is not installed"}
        elif time.time() + job.cost > until:
            yield {"note": f"{job.name}: left out, its {job.cost:.0f} s are more than what is left"}
        else:
            try:
                for row in job.act():
                    yield {"row": row.model_dump()}
            except Exception as error:
                traceback.print_exc()
                yield {"note": f"{job.name}: {_told(error)}"}
            bench.device.release()


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def ask_sections(
    sections: Sequence[Section], seconds: float, out: Path, run: Run, ask: Callable[[Section, float], Found]
) -> list[Row]:
    """Ask the sections one after the other while there is time, and write what they gave after each."""
    end = time.time() + seconds
    found: list[Row] = []
    notes: list[Note] = []
    for section in sections:
        left = end - time.time()
        if left < max(LEAST, section.cost / 3):
            new: Found = [], [f"{section.name}: left out, {left:.0f} s are left and it takes some {section.cost:.0f}"]
        else:
            print(f"\n# {section.name}: {section.title} ({left:.0f} s are left)", flush=True)
            new = ask(section, min(end, time.time() + SLACK * section.cost))
        found += [one.model_copy(update={"run": run}) for one in new[0]]
        notes += new[1]
        for note in new[1]:
            print(note, flush=True)
        write(out, found, notes, run)
    print(f"\nwritten: {out / 'gpu.jsonl'}, {out / 'gpu.md'}", flush=True)
    return found


def _ask(section: Section, until: float, rehearse: bool) -> Found:
    """One section in a process of its own, which is ended at `until`; what it printed until then counts."""
    command = [sys.executable, "-m", "bench", "gpu", "--worker", section.name, "--until", str(until)]
    process = subprocess.Popen(
        [*command, *(["--rehearse"] if rehearse else [])], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=max(LEAST, until - time.time()))
        ended = "" if process.returncode == 0 else f"{section.name}: its process ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        ended = f"{section.name}: stopped when its time was over"
    except BaseException:  # Ctrl-C: the section goes too
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    rows, notes = read(text)
    for one in rows:
        print(f"{one.contender}, {_case(one)}: {_value(one)}", flush=True)
    return rows, [*notes, *([ended] if ended else [])]


def read(text: str) -> Found:
    """Rows and notes from what a section printed; a last line that was cut off does not count."""
    rows, notes = [], []
    for line in text.splitlines():
        try:
            one = json.loads(line)
        except ValueError:
            continue
        if isinstance(one, dict) and "row" in one:
            rows.append(Row.model_validate(one["row"]))
        elif isinstance(one, dict) and "note" in one:
            notes.append(str(one["note"]))
    return rows, notes


def write(out: Path, rows: Sequence[Row], notes: Sequence[Note], run: Run) -> None:
    """The rows as JSON lines and the page, each whole."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "gpu.jsonl", "".join(one.model_dump_json() + "\n" for one in rows).encode())
    write_atomic(out / "gpu.md", page(rows, notes, run).encode())


def page(rows: Sequence[Row], notes: Sequence[Note], run: Run) -> str:
    """The Markdown page: where, what, and what is missing."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    parts = [f"# embedgrad on {run.machine.gpu or 'no GPU'}", f"`{run.command}`, {run.started}, commit {run.commit}. "
             f"{run.machine}. {versions}."]  # fmt: skip
    tables_ = tables(rows)
    tables_.pop("gpu-runs")
    titles = {one.name: one.title for one in SECTIONS} | {"decode profile": "Which kernels do answers consist of?"}
    for name, text in tables_.items():
        parts.append(f"## {titles[name.removeprefix('gpu-').replace('_', ' ')]}\n\n{text}")
    if notes:
        parts.append("## Left out, or failed\n\n" + "\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _case(one: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in one.case.items() if name != "device")


def _value(one: Row) -> str:
    if one.unit == "none":
        return str(one.more.get("error"))
    return f"{one.median * 1e3:.4g} ms" if one.unit == "s" else f"{one.median:.5g} {one.unit}"


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`gpu-runs`, and `gpu-SECTION` for each section that has rows (spaces in its name are underscores)."""
    found = {"gpu-runs": _runs(rows)}
    for name, make in TABLES.items():
        own = [one for one in rows if one.case["section"] == name]
        if own:
            found[f"gpu-{name.replace(' ', '_')}"] = of_cards(own, make)
    return found


def _runs(rows: Sequence[Row]) -> str:
    cells = []
    for run in dict.fromkeys(one.run.model_dump_json() for one in rows if one.run is not None):
        one = Run.model_validate_json(run)
        command = f"`{one.command}`" if one.command.startswith("python") else one.command
        versions = ", ".join(f"{name} {one.versions[name]}" for name in ("torch", "triton") if name in one.versions)
        cells.append((one.commit, one.started[:10], str(one.machine), versions, command))
    return table(("commit", "date", "machine", "with", "measured by"), cells)


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """None; the tables show it."""
    return {}
