"""Seconds of one call on a GPU.

A call is captured in a CUDA graph, so that no launch waits for Python. Before each run a buffer of twice the size of L2
is overwritten, as `bench ops` does; a warm case runs 20 times in one graph instead, with its data where it left them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

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
        size = 2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 128 << 20)
        self._device, self._flushed = device, torch.empty(size, dtype=torch.uint8, device=device)

    def timer(self, case: Case, options: dict[str, int], call: Callable[[], None]) -> Timer:
        times = IN_ONE_GRAPH if case.warm else 1
        replay = self._captured(call, times)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def seconds() -> float:
            if not case.warm:
                self._flushed.zero_()
            start.record()
            replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / times

        return seconds

    def _captured(self, call: Callable[[], None], times: int) -> Callable[[], None]:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            call()  # a first call allocates and loads what capturing must not
            call()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Threads that still compile for the search may call the driver meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(times):
                call()
        graph.replay()
        torch.cuda.synchronize(self._device)
        return graph.replay
