"""A clock and a compiler that need no GPU, and questions that the interpreter answers in no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bench.tune.candidates import Options, Question
from embedgrad.backends.launch_check import rowwise
from embedgrad.backends.launch_check.case import Case
from embedgrad.backends.launch_check.check import Checked
from embedgrad.backends.launch_check.compiled import Compiled

CPU = torch.device("cpu")
HALF = torch.float16


class Clock:
    """Seconds from a formula of case and parameters; every call is really made, in the interpreter.

    read: how often it was read. then: called before the reading of that number.
    """

    def __init__(
        self, seconds: Callable[[Case, Options], float], then: dict[int, Callable[[], None]] | None = None
    ) -> None:
        self._seconds, self._then, self.read = seconds, then or {}, 0
        self.readings: list[tuple[str, Options]] = []

    def timer(self, case: Case, options: Options, call: Callable[[], None]) -> Callable[[], float]:
        call()

        def seconds() -> float:
            self.read += 1
            self._then.get(self.read, lambda: None)()
            self.readings.append((case.text, options))
            return self._seconds(case, options)

        return seconds


class Compiler:
    """Says of a call what `says` does: None for a call that compiles."""

    def __init__(self, says: Callable[[Options], Compiled | None] = lambda options: Compiled()) -> None:
        self._says = says
        self.calls: list[Options] = []

    def __call__(
        self, calls: list[tuple[Checked, Options]], device: torch.device, until: float
    ) -> Sequence[Compiled | None]:
        self.calls += [options for _, options in calls]
        return [self._says(options) for _, options in calls]


def swiglu(*blocks: int, kernel: str = "swiglu") -> Question:
    """Blocks to try, on two widths, with two stages each; in use is 1024."""
    cases = tuple(rowwise.swiglu(3, width, HALF, kernel.endswith("backward")) for width in (70, 130))
    candidates = tuple({"BLOCK": block, "num_warps": 4, "num_stages": 2} for block in blocks)
    return Question(kernel, cases, candidates)
