"""Seconds of one call on a GPU.

A call is captured in a CUDA graph, so that no launch waits for Python. Before each run a buffer of twice the size of L2
is overwritten, as `bench ops` does; a warm case runs 20 times in one graph instead, with its data where it left them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from bench.harness.clock import captured, event_seconds, twice_l2
from embedgrad.backends.launch_check.case import Case

IN_ONE_GRAPH = 20
Timer = Callable[[], float]


class Clock(Protocol):
    """What the search needs of a clock."""

    def timer(self, case: Case, options: dict[str, int], call: Callable[[], None]) -> Timer:
        """Measures one `call` of a case, in seconds, whenever it is called."""


class CudaClock:
    """See the module."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._flushed = device, twice_l2(device)

    def timer(self, case: Case, options: dict[str, int], call: Callable[[], None]) -> Timer:
        times = IN_ONE_GRAPH if case.warm else 1

        def calls() -> None:
            for _ in range(times):
                call()

        replay = captured(calls, self._device)
        replay()
        torch.cuda.synchronize(self._device)

        def seconds() -> float:
            if not case.warm:
                self._flushed.zero_()
            return event_seconds(replay) / times

        return seconds
