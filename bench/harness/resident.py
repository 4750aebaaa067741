"""Memory that this process holds, or that it has allocated on its device: now, and at the most."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch


def resident(field: str = "VmRSS") -> int:
    """Bytes resident now ("VmRSS") or at the most ("VmHWM"); Linux."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def used(where: torch.device) -> int:
    """Bytes in use now, after freed memory has gone back to the system."""
    gc.collect()
    if where.type == "cuda":
        return torch.cuda.memory_allocated(where)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return resident()


def forget_peak(where: torch.device) -> None:
    """`peak` counts from here."""
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(where: torch.device) -> int:
    """The most bytes in use at once since `forget_peak`."""
    return torch.cuda.max_memory_allocated(where) if where.type == "cuda" else resident("VmHWM")
