"""`python -m bench NAME [--json FILE] [--quick] [options of that bench]`: asks one question and prints the answer.

A bench is a module `bench/NAME.py` with `add_arguments(parser)` and `main(args) -> list[dict]`, the rows behind what it
prints; its docstring's first line says which question it answers. `--json` writes the rows with machine and versions.
"""

import argparse
import ast
import importlib
import json
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def names() -> list[str]:
    """Every module beside this one that has a `main(args)`."""
    return sorted(p.stem for p in HERE.glob("*.py") if "\ndef main(" in p.read_text() and p.stem != "__main__")


def environment() -> dict[str, Any]:
    """What a reader needs to know about where the rows come from."""
    import torch
    import triton

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def question(name: str) -> str:
    """The first line of a bench's docstring, without importing it."""
    return (ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or name).splitlines()[0]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench", description="Ask one question of the program.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    module: Any = None
    for name in names():
        command = commands.add_parser(name, help=question(name), description=question(name))
        command.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
        command.add_argument("--quick", action="store_true", help="a small part of the question")
        if argv[:1] == [name]:  # the others need not even be importable
            module = importlib.import_module(f"bench.{name}")
            module.add_arguments(command)
    args = parser.parse_args(argv)
    rows = module.main(args)
    if args.json:
        command_line = " ".join(["python -m bench", *argv])
        document = {"command": command_line, "environment": environment(), "rows": rows}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
