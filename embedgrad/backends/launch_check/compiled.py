"""Compiles the kernels of many calls in parallel, and says which of them spill registers or do not fit the device.

Triton compiles a kernel at its first launch, one after the other. Here the launches are recorded and given to `warmup`
in threads: Triton's passes and ptxas release Python's lock. A later launch finds the compiled kernel in Triton's cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from embedgrad.backends.launch_check.check import Checked, named_error
from embedgrad.kernels import launch
from embedgrad.kernels.launch import Launch


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a call's launches. spills: registers of a thread that lie in memory, of the worst."""

    fault: str | None = None
    spills: int = 0


def launches(checked: Checked, options: launch.Options) -> list[Launch]:
    """What a case would launch under `options`; nothing is launched. Raises what the launcher raises."""
    found: list[Launch] = []

    def record(one: Launch) -> bool:
        found.append(one)
        return False

    with launch.overridden(checked.case.kernel, **options), launch.recorded(record):
        checked.case.run(checked.given, checked.case.fresh(checked.given))
    return found


def compile_all(
    calls: Iterable[tuple[Checked, launch.Options]], device: torch.device, *, until: float | None = None
) -> list[Compiled | None]:
    """What becomes of each call; None for those that were not compiled before time.monotonic() reached `until`."""
    calls = list(calls)
    pool = ThreadPoolExecutor(processors())
    futures: dict[Any, Future[Any]] = {}
    wanted: list[list[Future[Any]] | Compiled] = []
    try:
        for checked, options in calls:
            try:
                found = launches(checked, options)
            except Exception as error:
                wanted.append(Compiled(fault=named_error(error)))
                continue
            keys = [(_key(one), one) for one in found]
            for key, one in keys:
                if key not in futures:
                    futures[key] = pool.submit(_warm_up, one, device)
            wanted.append([futures[key] for key, _ in keys])
        wait(futures.values(), timeout=None if until is None else max(until - time.monotonic(), 0))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [one if isinstance(one, Compiled) else _outcome(one) for one in wanted]


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _warm_up(one: Launch, device: torch.device) -> Any:
    kernel, grid, arguments, constants = one
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread has a current device of its own
    return kernel.warmup(*arguments, grid=grid, **constants)


def _outcome(futures: list[Future[Any]]) -> Compiled | None:
    """Loads the compiled kernels: only the device knows what it has room for."""
    if not all(future.done() and not future.cancelled() for future in futures):
        return None
    spills = 0
    for future in futures:
        try:
            kernel = future.result()
            if kernel is not None:  # the interpreter compiles nothing
                kernel._init_handles()
                spills = max(spills, int(kernel.n_spills))
        except Exception as error:
            return Compiled(fault=named_error(error))
    return Compiled(spills=spills)


def _key(one: Launch) -> Any:
    """Launches with equal keys have the same machine code: Triton specialises on nothing else."""
    kernel, _, arguments, constants = one
    return kernel, tuple(map(_kind, arguments)), tuple(sorted(constants.items(), key=lambda item: item[0]))


def _kind(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if type(x) is int:
        return "int", x == 1, x % 16 == 0, x.bit_length() > 31
    return type(x)
