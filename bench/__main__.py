"""`python -m bench QUESTION [--quick] [--json FILE] [options of that question]`: ask one question and print the answer.

A question is a module `bench/NAME.py` that has what `bench.harness.report.Question` names. Its rows are appended to
bench/results/NAME.jsonl, and the tables and pictures of the documents are made anew from all rows
(`python -m bench report` does that alone). Rows of a `--quick` run are marked, and the documents stay as they are.
`python -m bench all` asks all questions. `python -m bench tune` is no question: it writes launch parameters.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from bench.harness import report, rows
from bench.harness.report import Question
from bench.harness.rows import ROOT, Row
from bench.harness.verify import verify

HERE = Path(__file__).parent
ALL = (
    ("step",), ("decode",), ("serve",), ("load",), ("ops",), ("scale",), ("ablation",), ("quality",), ("exported",),
    ("memory",), ("predict",), ("ranks",), ("host",), ("kernels", "--static"), ("gpu",),
)  # fmt: skip


def names() -> list[str]:
    """Every question: the modules beside this one."""
    return sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("__"))


def question(name: str) -> Question:
    """The module that answers a question."""
    return cast(Question, importlib.import_module(f"bench.{name}"))


def asked(name: str) -> str:
    """The question itself, the first line of its module's docstring; imports nothing."""
    return (ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or name).splitlines()[0]


def parse(argv: Sequence[str]) -> tuple[Question | None, argparse.Namespace]:
    """The question that `argv` names (None for all and report), and its options."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Ask one question of the program.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    everything = commands.add_parser("all", help="all questions, one after the other")
    again = commands.add_parser("report", help="make every table and picture anew from bench/results")
    again.add_argument("--check", action="store_true", help="only say which documents are out of date")
    again.add_argument("--take", type=Path, metavar="FILE", help="append rows that were measured elsewhere first")
    tuning = commands.add_parser("tune", help="find the fastest launch parameters on this GPU, and write their rows")
    if argv[:1] == ["tune"]:
        importlib.import_module("bench.tune.command").add_arguments(tuning)
    module = None
    for name in names():
        command = commands.add_parser(name, help=asked(name), description=asked(name))
        if argv[:1] == [name]:  # the others are not imported
            module = question(name)
            module.add_arguments(command)
        _common(command)
    _common(everything)
    return module, parser.parse_args(argv)


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
    command.add_argument("--quick", action="store_true", help="a small part of the question, under two minutes")
    command.add_argument("--unrecorded", action="store_true", help="append no rows and make no documents anew")
    command.add_argument("--unchecked", action="store_true", help=argparse.SUPPRESS)  # while one writes a question


def ask(argv: Sequence[str], *, checked: bool = False) -> list[Row]:
    """Ask one question: check, measure, record, make its documents anew; the rows. `checked`: its tests have passed."""
    module, args = parse(argv)
    assert module is not None
    if getattr(args, "worker", None):  # a contender's process
        module.main(args)
        return []
    if not checked and not args.unchecked:
        verify(module.CHECKS)
    args.run = run = rows.this_run(argv, args.quick)
    found = [row.model_copy(update={"run": run}) for row in module.main(args)]
    if not (args.unrecorded or args.unchecked):
        rows.append(found)
        if not args.quick:
            report.rebuild([module])
    for text in module.tables(found).values():
        print(f"\n{text}")
    return found


def ask_all(args: argparse.Namespace) -> list[Row]:
    """Ask all questions. The tests of what they time run once, before the first."""
    common = [f"--{name}" for name in ("quick", "unrecorded") if getattr(args, name)]
    chosen = [argv for argv in ALL if argv[0] != "gpu" or torch.cuda.is_available()]
    if len(chosen) < len(ALL):
        print("gpu is left out: no CUDA device is present here.")
    verify(test for name, *_ in chosen for test in question(name).CHECKS)
    found = []
    for argv in chosen:
        print(f"\n# {asked(argv[0])}", flush=True)
        found += ask([*argv, *common], checked=True)
    return found


def report_all(*, check: bool, take: Path | None = None) -> int:
    """Make all documents anew; with `check` only say which are out of date, as the exit status does.

    take: a file whose rows are appended first.
    """
    if take is not None:
        try:
            for path in rows.take(take):
                print(f"appended to {path.relative_to(ROOT)}")
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    questions = [question(name) for name, *_ in ALL]
    if not check:
        report.rebuild(questions)
        return 0
    old = report.outdated(questions)
    for path in old:
        print(f"{path.relative_to(ROOT)} is out of date: run `python -m bench report`.")
    if not old:
        print("up to date")
    return 1 if old else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    _, args = parse(argv)
    if args.name == "report":
        return report_all(check=args.check, take=args.take)
    if args.name == "tune":
        return int(importlib.import_module("bench.tune.command").main(args))
    found = ask_all(args) if args.name == "all" else ask(argv)
    if args.json:
        args.json.write_text(json.dumps([row.model_dump() for row in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
