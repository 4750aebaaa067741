"""Times by the clock of the device: wall time on a CPU, CUDA events behind a flushed L2 cache on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Timed = Callable[[], Any]


def device(name: str) -> torch.device:
    """The device that a bench was asked for; SystemExit with a sentence where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is present here, so there is nothing to measure on one; leave --device out.")
    return torch.device(name)


def take_turns(
    contenders: Sequence[Timed], repeats: int, where: torch.device, prepare: Timed | None = None, *, warm: bool = False
) -> list[list[float]]:
    """Seconds of each contender, `repeats` times; they take turns, and the first turn (warming up) is not counted.

    warm: on a CPU each runs twice in its turn and the second counts: it finds what it works on where it left it,
    and not where another contender has pushed it.

    `prepare` runs before each, untimed. On a GPU a buffer of the size of L2 (or 256 MiB, if that is unknown) is
    overwritten before each, and clocks are left as they are.
    """
    found: list[list[float]] = [[] for _ in contenders]
    once = _cuda_seconds(where) if where.type == "cuda" else _wall_seconds
    for number in range(repeats + 1):
        for times, run in zip(found, contenders, strict=True):
            if prepare is not None:
                prepare()
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
    size = 2 * getattr(torch.cuda.get_device_properties(where), "L2_cache_size", 128 << 20)
    flushed = torch.empty(size, dtype=torch.uint8, device=where)

    def seconds(run: Timed) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flushed.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds
