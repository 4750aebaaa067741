"""Which launch parameters are fastest on this GPU? Writes the rows of kernels/tuned_rows.json and prints the change.

Every kernel, or those of --kernel, shares the minutes. A kernel's row is written when it is found, so a run that ends
early (Ctrl-C, the time, a candidate that breaks the device) leaves what it has found. A row replaces the row for the
same kernel, architecture, element sizes and range of sizes; others stay.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
import triton
from embedgrad.kernels import launch, tuned_rows
from embedgrad.kernels.launch_row import Row, Tuned

from bench.tune.candidates import Question, questions
from bench.tune.clock import Clock, CudaClock
from bench.tune.search import Broken, Compiler, Found, Stopped, compile_calls, search
from embedgrad.backends.launch_check.check import named_error
from embedgrad.util.errors import EmbedGradError
from embedgrad.util.files import write_atomic

INTERRUPTED = 130
LEAST_MINUTES = 0.2  # for going on after a lost device: a new process takes some seconds to start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    kernels = sorted({question.kernel for question in questions()})
    parser.add_argument("--device", default="cuda", help="the GPU: cuda, or cuda:1 (cuda)")
    parser.add_argument("--minutes", type=_minutes, default=10.0, help="for all kernels together (10)")
    parser.add_argument("--kernel", nargs="+", action="extend", choices=kernels, metavar="NAME",
                        help=f"only these: {', '.join(kernels)}")  # fmt: skip
    parser.add_argument("--into", type=Path, metavar="FILE", default=tuned_rows.FILE,
                        help="the file of rows to change (kernels/tuned_rows.json)")  # fmt: skip
    parser.add_argument("--spills", type=int, default=0, metavar="N",
                        help="registers of a thread that a candidate may spill (0)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="append every time measured, a line a question")
    # How a run goes on after a candidate has broken the device: the question to begin with, and what to leave out.
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help=argparse.SUPPRESS)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; minutes are a positive number")
    return value


@dataclass
class Tuning:
    """A run over several questions, which share the time.

    into: the file of rows, written whenever a row is found. json: what was measured is appended here. clock, compiler:
    may be stand-ins. without: names of candidates to leave out. spills: registers that each may spill. found: the
    outcomes so far. number: of the question at hand.
    """

    device: torch.device
    into: Path
    clock: Clock
    compiler: Compiler = compile_calls
    without: Sequence[str] = ()
    spills: int = 0
    told: Callable[[str], None] = print
    json: Path | None = None
    found: list[Found] = field(default_factory=list)
    number: int = 0

    def run(self, asked: Sequence[Question], seconds: float) -> None:
        """Answers the questions in their order. Raises Broken, and KeyboardInterrupt once what was found is written."""
        until = time.monotonic() + seconds
        for self.number, question in enumerate(asked):
            left = until - time.monotonic()
            if left <= 0:
                self.told(f"the time is over: not tuned {', '.join(one.name for one in asked[self.number :])}")
                return
            share = left / (len(asked) - self.number)
            self.told(f"{question.name}: {len(question.candidates)} candidates, {share:.0f} s")
            found = self._answer(question, share)
            if found is not None:
                self._keep(found)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _answer(self, question: Question, seconds: float) -> Found | None:
        try:
            found = search(
                question, self.device, self.clock, seconds=seconds, compiler=self.compiler, without=self.without,
                spills=self.spills, told=self.told,
            )  # fmt: skip
        except Stopped as stopped:
            if stopped.found is not None:
                self._keep(stopped.found)
            raise KeyboardInterrupt from None
        except torch.OutOfMemoryError as error:
            self.told(f"  not tuned: {named_error(error)}")
            return None
        if found is None:
            self.told("  nothing could be said in this time; the row in use stays")
        return found

    def _keep(self, found: Found) -> None:
        self.found.append(found)
        if self.json is not None:
            with self.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_measured(found, self.device)) + "\n")
        ended = "" if found.finished else " (cut short)"
        times = "; ".join(
            f"{text}: {1e6 * us:.1f} us" + (f" (in use {1e6 * found.before[text]:.1f})" if found.before else "")
            for text, us in found.seconds.items()
        )
        if found.options is None:
            self.told(f"  the rows in use stay, one for each shape{ended}: {times}")
            return
        self.told(f"  {found.options}, {found.gained:.1%} less time{ended}: {times}")
        row = row_of(found, launch.architecture(self.device), device_name(self.device))
        rows = tuned_rows.merged(read(self.into), [row])
        write_atomic(self.into, tuned_rows.text_of(rows).encode())


def row_of(found: Found, arch: str, device: str) -> Row:
    """The row of the launch table that an outcome stands for."""
    assert found.options is not None
    question = found.question
    microseconds, before = (
        {text: round(1e6 * value, 2) for text, value in one.items()} for one in (found.seconds, found.before)
    )
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    tuned = Tuned(triton.__version__, device, date, microseconds, before)
    return Row(
        question.kernel, arch, dict(found.options), tuned_rows.reason(tuned), bytes=question.bytes,
        at_most=question.at_most, at_least=question.at_least, tuned=tuned,
    )  # fmt: skip


def _measured(found: Found, device: torch.device) -> dict[str, object]:
    """Everything that was timed, as JSON-able values; times in seconds."""
    return {
        "question": found.question.name, "arch": launch.architecture(device), "device": device_name(device),
        "triton": triton.__version__, "winner": found.options, "gained": found.gained, "finished": found.finished,
        "seconds": found.measured,
    }  # fmt: skip


def device_name(device: torch.device) -> str:
    """The device's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"


def read(path: Path) -> tuple[Row, ...]:
    """The rows of a file; none where it does not exist. Raises EmbedGradError where it holds something else."""
    try:
        return tuned_rows.parse(path.read_text("utf-8")) if path.exists() else ()
    except (OSError, ValueError) as error:
        raise EmbedGradError(f"{path} is no file of tuned rows, so nothing is written to it: {error}.") from None


def change(before: str, after: str, path: Path) -> str:
    """The change of the file as a patch in git's form."""
    name = path.name if path != tuned_rows.FILE else "kernels/tuned_rows.json"
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{name}", f"b/{name}")
    return "".join(lines)


def device_of(name: str) -> torch.device:
    """The GPU called `name`. Raises EmbedGradError where it is not there or kernels are not compiled."""
    count = torch.cuda.device_count()
    known = ["cuda", *(f"cuda:{index}" for index in range(count))]
    if not count or name not in known:
        there = f"choose one of {', '.join(known)}" if count else "torch finds no GPU, so there is nothing to tune on"
        raise EmbedGradError(f"there is no device {name!r}: {there}.")
    if launch.interpreted():
        raise EmbedGradError("TRITON_INTERPRET is set, so kernels are interpreted and not compiled; unset it.")
    return torch.device("cuda", 0 if name == "cuda" else int(name.removeprefix("cuda:")))


def main(args: argparse.Namespace) -> int:
    """The command; the exit status."""
    try:
        before, device = tuned_rows.text_of(read(args.into)), device_of(args.device)
        write_atomic(args.into, before.encode())  # what cannot be written is refused now, not after the minutes
        torch.cuda.set_device(device)
        return _tune(args, device, before)
    except EmbedGradError as refusal:
        print(f"bench: {refusal}", file=sys.stderr)
        return 2


def _tune(args: argparse.Namespace, device: torch.device, before: str) -> int:
    started, status = time.monotonic(), 0
    tuning = Tuning(device, args.into, CudaClock(device), without=args.without, spills=args.spills, json=args.json)
    asked = [one for one in questions() if args.kernel is None or one.kernel in args.kernel]
    try:
        tuning.run(asked[args.first :], 60 * args.minutes)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Broken as broken:
        print(f"  the device is lost: {broken}", flush=True)
        status = go_on(args, broken, tuning.number, args.minutes - (time.monotonic() - started) / 60)
    print("\n" + (change(before, tuned_rows.text_of(read(args.into)), args.into) or "no row has changed"))
    return status


def go_on(args: argparse.Namespace, broken: Broken, number: int, minutes: float) -> int:
    """Goes on in a new process, in which the device works again, without the candidate that has broken it.

    number: of the question at hand. Where the parameters in use have broken the device, it is left out.
    """
    if minutes < LEAST_MINUTES:
        return 1
    without, first = [*args.without, broken.candidate], args.first + number
    if broken.candidate.startswith("in use"):
        without, first = list(args.without), first + 1
    command = ["-m", "bench", "tune", "--device", args.device, "--minutes", f"{minutes:.3f}", "--into", str(args.into)]
    command += ["--kernel", *args.kernel] if args.kernel else []
    command += ["--first", str(first), "--spills", str(args.spills)]
    command += [word for name in without for word in ("--without", name)]
    command += ["--json", str(args.json)] if args.json else []
    print(f"going on without it: python {shlex.join(command)}", flush=True)
    os.execv(sys.executable, [sys.executable, *command])
