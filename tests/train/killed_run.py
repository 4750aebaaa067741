"""Run an optimisation, kill it with SIGKILL at a chosen write, resume it, and say whether all ends the same.

    python -m tests.train.killed_run MODEL_FOLDER WORK_FOLDER FIRST LAST STRIDE

For every moment from FIRST to LAST, STRIDE apart: a fork of this process optimises in a new run folder and kills
itself at that moment; a second one resumes it and is killed too, if it comes that far; a third one ends it. A moment
is the beginning or the end of an fsync, rename, truncation or removal, or the middle of writing a line of metrics.
Prints JSON: how many moments an uninterrupted run has, how many sessions were killed, and the moments after which
something ended differently.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embedgrad.engine.model import load_model
from embedgrad.train.optimize import optimize
from embedgrad.train.run_folder import RunFolder
from tests.train.training import TRAIN, VALIDATION, outcome, quick_config, start_prompt


class Moments:
    """Counts the moments of this process and kills it at number `fatal` (0: never)."""

    def __init__(self, fatal: int) -> None:
        self.fatal = fatal
        self.count = 0

    def pass_one(self) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, true_function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.pass_one()
            result = true_function(*arguments, **options)
            self.pass_one()
            return result

        return watched

    def watch(self) -> None:
        for name in ("fsync", "replace", "truncate", "unlink"):
            setattr(os, name, self.around(getattr(os, name)))
        Path.unlink = self.around(Path.unlink)  # type: ignore[method-assign]
        append = RunFolder.append

        def torn_append(folder: RunFolder, record: Any) -> None:
            if self.count + 1 == self.fatal:
                with open(folder.path / "metrics.jsonl", "ab") as file:
                    file.write(json.dumps(record).encode()[:-9])
            self.pass_one()
            append(folder, record)

        RunFolder.append = torn_append  # type: ignore[method-assign]


def session(run: Path, fatal: int, model: Any) -> tuple[bool, int]:
    """One forked session; (whether it ended by itself, the moments it counted)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            moments = Moments(fatal)
            moments.watch()
            optimize(
                model, start_prompt(model), TRAIN, VALIDATION, quick_config(), run_dir=run,
                resume="auto" if run.exists() else False,
            )  # fmt: skip
            os.write(writer, str(moments.count).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False, 0
    if status != 0:
        raise SystemExit(f"a session failed with status {status} (fatal moment {fatal}, {run})")
    return True, int(told)


def main() -> None:
    model_folder, work = Path(sys.argv[1]), Path(sys.argv[2])
    first, last, stride = map(int, sys.argv[3:6])
    torch.set_num_threads(1)
    model = load_model(model_folder, device="cpu")
    _, moments = session(work / "whole", 0, model)
    expected = outcome(work / "whole")
    killed, different = 0, []
    for moment in range(first, min(last, moments) + 1, stride):
        run = work / f"killed-{moment}"
        for fatal in (moment, moment // 2 + 3, 0):
            if session(run, fatal, model)[0]:
                break
            killed += 1
        if outcome(run) != expected:
            different.append(moment)
    print(json.dumps({"moments": moments, "killed": killed, "different": different}))


if __name__ == "__main__":
    main()
