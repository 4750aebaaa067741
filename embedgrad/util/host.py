"""The memory of this machine and its devices, and copies from the host to a device."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

PARCEL_ALIGNMENT = 64  # bytes; enough for the widest loads of every kernel


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. The host does not wait: a copy from pinned memory is only put into the device's queue."""
    if device.type != "cuda" or x.device.type != "cpu" or not x.numel():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class Parcel:
    """The layout of several tensors in one buffer of `nbytes` bytes, so that one copy transfers all of them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: give the types and shapes, which must be the same in every call of `fill`."""
        self._kinds = [(x.dtype, x.shape) for x in tensors]
        self._starts = [0]
        for x in tensors:
            self._starts.append(self._starts[-1] + -(-x.nbytes // PARCEL_ALIGNMENT) * PARCEL_ALIGNMENT)
        self.nbytes = self._starts.pop()

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors as views into `buffer` [nbytes] uint8."""
        return [
            buffer[start : start + dtype.itemsize * shape.numel()].view(dtype).view(shape)
            for start, (dtype, shape) in zip(self._starts, self._kinds, strict=True)
        ]

    def fill(self, buffer: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Copies `tensors` to their places in `buffer`, and returns it."""
        for place, x in zip(self.views(buffer), tensors, strict=True):
            place.copy_(x)
        return buffer


def send_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """`tensors`, which are on the CPU, on `device`. One copy transfers all; the host does not wait for it."""
    if device.type != "cuda":
        return [x.to(device) for x in tensors]
    parcel = Parcel(tensors)
    buffer = parcel.fill(torch.empty(parcel.nbytes, dtype=torch.uint8, pin_memory=True), tensors)
    return parcel.views(buffer.to(device, non_blocking=True))


def available_memory(device: torch.device | None = None) -> int:
    """Bytes of memory that can be allocated now on `device` (default: the host).

    On the host: memory that needs no swapping, at most what the container's limit leaves. On a GPU: free memory, and
    memory that torch has reserved but does not use.
    """
    if device is not None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _meminfo_available()
    limit, used = _read_int("/sys/fs/cgroup/memory.max"), _read_int("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        available = min(available, max(limit - used, 0))
    return available


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None
