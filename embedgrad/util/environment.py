"""The machine and the versions of the installed packages, as JSON-able values."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

PACKAGES = ("embedgrad", "torch", "triton", "numpy", "safetensors", "tokenizers", "gguf", "huggingface_hub")


def machine() -> dict[str, Any]:
    """System, processor, number of cores that this process may use, torch's threads, vector instructions, GPUs.

    The result holds no names of hosts or people, because it is stored with runs. A GPU's memory is in bytes.
    """
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of PACKAGES by name; None for a package that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "memory": properties.total_memory, "capability": capability}
