"""Seconds by the device's clock: wall time on a CPU, CUDA events behind a flushed L2 cache on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Timed = Callable[[], Any]


def device(name: str) -> torch.device:
    """The device called `name`; SystemExit with a sentence where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is present here, so there is nothing to measure on one; leave --device out.")
    return torch.device(name)


def take_turns(
    contenders: Sequence[Timed], repeats: int, where: torch.device, *, warm: bool = False
) -> list[list[float]]:
    """Seconds of each contender, `repeats` times. They take turns, and the first turn (warming up) does not count.

    warm: on a CPU each contender runs twice in its turn and the second run counts, so that it finds its data in the
    caches and not where another contender has pushed it.

    On a GPU a buffer of twice the size of L2 (256 MiB where that is unknown) is overwritten before each run. Clock
    rates are left as they are.
    """
    found: list[list[float]] = [[] for _ in contenders]
    once = _cuda_seconds(where) if where.type == "cuda" else _wall_seconds
    for number in range(repeats + 1):
        for times, run in zip(found, contenders, strict=True):
            if warm and where.type == "cpu":
                run()
            seconds = once(run)
            if number:
                times.append(seconds)
    return found


def _wall_seconds(run: Timed) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _cuda_seconds(where: torch.device) -> Callable[[Timed], float]:
    flushed = twice_l2(where)

    def seconds(run: Timed) -> float:
        flushed.zero_()
        return event_seconds(run)

    return seconds


def twice_l2(where: torch.device) -> torch.Tensor:
    """Memory of twice the size of a GPU's L2 cache; to overwrite it is to empty the cache."""
    size = 2 * getattr(torch.cuda.get_device_properties(where), "L2_cache_size", 128 << 20)
    return torch.empty(size, dtype=torch.uint8, device=where)


def event_seconds(run: Timed) -> float:
    """Seconds of one `run` by the GPU's clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(run: Timed, where: torch.device) -> Timed:
    """`run` as a CUDA graph: what replays it. It runs once before, which allocates and loads what capturing must not.

    Other threads may call the driver meanwhile.
    """
    stream = torch.cuda.Stream(where)
    stream.wait_stream(torch.cuda.current_stream(where))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(where).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph.replay
