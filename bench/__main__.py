"""`python -m bench NAME [--quick] [--json FILE] [options of that bench]`: asks one question and prints the answer.

A bench is a module `bench/NAME.py` whose docstring's first line says which question it answers, with

    CHECKS                      pytest ids that must pass before anything is timed
    add_arguments(parser)       its options
    main(args) -> list[Row]     measures (bench/rows.py)
    tables(rows) -> dict        name → Markdown, made from rows of one run
    pictures(rows) -> dict      name → matplotlib figure

Rows are appended to bench/results/NAME.jsonl, and the tables and pictures that come from them are made anew, in
README.md and bench/README.md too (`python -m bench report` does that alone). `--quick` runs are marked as such and
leave the documents alone. `python -m bench all` asks all questions.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ALL = (
    ("step",), ("decode",), ("load",), ("ops",), ("scale",), ("ablation",), ("quality",), ("memory",), ("predict",),
    ("kernels", "--static"),
)  # fmt: skip


def names() -> list[str]:
    """Every module beside this one that has a `main(args)`."""
    found = (path.stem for path in HERE.glob("*.py") if "\ndef main(" in path.read_text())
    return sorted(name for name in found if name not in ("__main__", "report"))


def question(name: str) -> str:
    """The first line of a bench's docstring, without importing it."""
    return (ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or name).splitlines()[0]


def parse(argv: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """The bench that `argv` names (None for all and report), and its options."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Ask one question of the program.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    everything = commands.add_parser("all", help="all questions, one after the other")
    report = commands.add_parser("report", help="make every table and picture anew from bench/results")
    report.add_argument("--check", action="store_true", help="only say which documents are out of date")
    module: Any = None
    for name in names():
        command = commands.add_parser(name, help=question(name), description=question(name))
        if argv[:1] == [name]:  # the others need not even be importable
            module = importlib.import_module(f"bench.{name}")
            module.add_arguments(command)
        _common(command)
    _common(everything)
    return module, parser.parse_args(argv)


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
    command.add_argument("--quick", action="store_true", help="a small part of the question, under two minutes")
    command.add_argument("--unrecorded", action="store_true", help="append no rows and make no documents anew")
    command.add_argument("--unchecked", action="store_true", help=argparse.SUPPRESS)  # while one writes a bench


def ask(argv: Sequence[str], *, checked: bool = False) -> list[Any]:
    """One question: check, measure, record, and make its documents anew; the rows. `checked`: its tests have passed."""
    from bench import report, rows
    from bench.verify import verify

    module, args = parse(argv)
    if getattr(args, "worker", None):  # a contender's process
        module.main(args)
        return []
    if not checked and not args.unchecked:
        verify(module.CHECKS)
    run = rows.this_run(argv, args.quick)
    found = [row.model_copy(update={"run": run}) for row in module.main(args)]
    if not (args.unrecorded or args.unchecked):
        rows.append(found)
        if not args.quick:
            report.rebuild([args.name])
    for text in module.tables(found).values():
        print(f"\n{text}")
    return found


def ask_all(args: argparse.Namespace) -> list[Any]:
    """All questions; the tests of all that is timed run once, before the first."""
    from bench.verify import verify

    common = [f"--{name}" for name in ("quick", "unrecorded") if getattr(args, name)]
    verify(test for name, *_ in ALL for test in importlib.import_module(f"bench.{name}").CHECKS)
    found = []
    for argv in ALL:
        print(f"\n# {question(argv[0])}", flush=True)
        found += ask([*argv, *common], checked=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    _, args = parse(argv)
    if args.name == "report":
        from bench import report

        return report.main(args)
    found = ask_all(args) if args.name == "all" else ask(argv)
    if args.json:
        args.json.write_text(json.dumps([row.model_dump() for row in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
