"""A contender in a process of its own. It is asked in JSON lines, so that contenders can take turns."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Worker:
    """The process `python -m bench QUESTION ARGUMENTS...`, which calls `serve`."""

    def __init__(self, question: str, *arguments: str, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench", question, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(threads), cwd=Path.cwd(),
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self.ready = self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stdin.close()
        self._process.wait()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for the answer."""
        self._stdin.write(json.dumps(request) + "\n")
        self._stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        for line in self._stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("a contender's process ended before it answered; its message stands above.")


def environment(threads: int) -> dict[str, str]:
    """The environment of a contender's process."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def workers(question: str, arguments: Mapping[str, Sequence[str]], threads: int) -> Iterator[dict[str, Worker]]:
    """A worker for each name in `arguments`; all end with the block."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(Worker(question, *given, threads=threads)) for name, given in arguments.items()
        }


def serve(ready: dict[str, Any], answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The worker's side: print `ready`, then answer every request on standard input."""
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
