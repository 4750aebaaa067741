"""The device that is measured, its clocks, and what stands in for it where there is none."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.harness.clock import captured, event_seconds, twice_l2

Run = Callable[[], Any]
FEWEST, MOST = 5, 60  # timings of one operation
WAIT, WAIT_CYCLES = 1e-3, 2_000_000  # seconds, and about as many cycles of the device: enough to queue 20 launches


@dataclass(frozen=True)
class Profile:
    """wall: seconds until the device had finished. kernels: name → (seconds on the device, launches)."""

    wall: float
    kernels: dict[str, tuple[float, int]]

    @property
    def busy(self) -> float:
        """Seconds of all kernels."""
        return sum(seconds for seconds, _ in self.kernels.values())


class Device:
    """An NVIDIA GPU. Its clock rates are left as they are."""

    interpreted = False

    def __init__(self) -> None:
        self.where = torch.device("cuda", torch.cuda.current_device())
        self.dtype = torch.bfloat16
        self._flushed = twice_l2(self.where)

    def synchronize(self) -> None:
        """Wait until it has finished."""
        torch.cuda.synchronize(self.where)

    def seconds(self, run: Run, budget: float = 0.06) -> list[float]:
        """Seconds of `run` on the device, some `budget` seconds long, L2 overwritten before each.

        The device waits until the host has queued the run, so that the time to launch it does not count.
        """
        run()
        once = self._once(run)
        return [self._once(run) for _ in range(max(FEWEST, min(MOST, int(budget / max(once + WAIT, 1e-5)))))]

    def graph_seconds(self, run: Run, calls: int = 20) -> list[float]:
        """Seconds of one of `calls` calls in a CUDA graph: without the host, and with data in L2 where it fits."""
        run()
        self.synchronize()
        replay = captured(lambda: [run() for _ in range(calls)], self.where)
        replay()
        return [self._timed(replay) / calls for _ in range(FEWEST)]

    def replay_seconds(self, replay: Run, repeats: int = 5) -> list[float]:
        """Seconds of something that was captured, several replays one after the other."""
        return [self._timed(replay) for _ in range(repeats)]

    def wall_seconds(self, run: Run, repeats: int) -> list[float]:
        """Seconds by the host's clock, until the device has finished."""
        found = []
        for _ in range(repeats):
            self.synchronize()
            started = time.perf_counter()
            run()
            self.synchronize()
            found.append(time.perf_counter() - started)
        return found

    def peak_bytes(self, run: Run) -> int:
        """The most that torch had allocated during `run`, weights included."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.where)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.where)

    def release(self) -> None:
        """Give back memory that nothing uses."""
        gc.collect()
        torch.cuda.empty_cache()

    def profile(self, run: Run) -> Profile:
        """Kernels of one `run`, by their own times."""
        self.synchronize()
        started = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            run()
            self.synchronize()
        wall, kernels = time.perf_counter() - started, {}
        for each in found.key_averages():
            if each.device_type == torch.autograd.DeviceType.CUDA and each.self_device_time_total:
                kernels[each.key] = (each.self_device_time_total / 1e6, each.count)
        return Profile(wall, kernels)

    def random(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Normal numbers."""
        return (torch.randn(*shape, device=self.where) * scale).to(dtype or self.dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for a result."""
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.where)

    def _once(self, run: Run) -> float:
        self._flushed.zero_()
        torch.cuda._sleep(WAIT_CYCLES)  # torch's own tests wait so, too
        return self._timed(run)

    def _timed(self, run: Run) -> float:
        return event_seconds(run)


class Rehearsal(Device):
    """A CPU on which Triton interprets the kernels: everything is gone through, and no figure means anything."""

    interpreted = True

    def __init__(self) -> None:
        self.where, self.dtype = torch.device("cpu"), torch.float32

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def seconds(self, run: Run, budget: float = 0.0) -> list[float]:
        """Of one run."""
        return [self._timed(run)]

    def graph_seconds(self, run: Run, calls: int = 1) -> list[float]:
        """Of one run."""
        return [self._timed(run)]

    def replay_seconds(self, replay: Run, repeats: int = 1) -> list[float]:
        """Of one replay."""
        return [self._timed(replay)]

    def wall_seconds(self, run: Run, repeats: int) -> list[float]:
        """Of one run."""
        return [self._timed(run)]

    def peak_bytes(self, run: Run) -> int:
        """Nothing is known of the memory."""
        run()
        return 0

    def release(self) -> None:
        """As on a GPU."""
        gc.collect()

    def profile(self, run: Run) -> Profile:
        """The run as one kernel."""
        spent = self._timed(run)
        return Profile(spent, {"everything": (spent, 1)})

    def _timed(self, run: Run) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
