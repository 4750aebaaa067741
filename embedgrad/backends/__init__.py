"""Backends: implementations of `embedgrad.backends.base.Backend`; the decoder is handed one of them."""

from __future__ import annotations

import importlib
import warnings

import torch

from embedgrad.backends.base import Backend
from embedgrad.util.errors import BackendError

NAMES = ("naive", "reference", "native", "triton")
NATIVE_TYPES = (torch.float32, torch.bfloat16)


class BackendWarning(UserWarning):
    """A slower backend serves, because the one meant for this machine cannot be loaded."""


GPU_TORCH = (2, 8)
"""The first release whose mm and addmm take an out_dtype on a GPU."""


def choose(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """The backend called `name`, for a model on `device` that computes in `dtype`.

    "auto" is triton on GPUs (torch calls those of ROCm "cuda", too), native on CPUs for float32 and
    bfloat16 (with a BackendWarning and reference where csrc/ is not built), and reference otherwise.
    Raises BackendError: an unknown name, a backend that cannot run here or not in this type, or a GPU and a torch whose
    products cannot give float32 for 16-bit operands.
    """
    if device.type == "cuda" and _release(torch.__version__) < GPU_TORCH:
        oldest = ".".join(map(str, GPU_TORCH))
        raise BackendError(
            f"a GPU needs torch {oldest} or newer, and this is {torch.__version__}; install a newer one."
        )
    if name == "auto":
        return _best(device, dtype)
    if name not in NAMES:
        raise BackendError(f"unknown backend {name!r}; choose one of auto, {', '.join(NAMES)}.")
    if name == "triton":
        return _triton(device, dtype)
    if name == "native":
        return _native(device, dtype)
    return _module(name).OPS


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def _module(name: str):  # type: ignore[no-untyped-def]
    return importlib.import_module(f"embedgrad.backends.{name}")


def _best(device: torch.device, dtype: torch.dtype) -> Backend:
    if device.type == "cuda" and dtype != torch.float64:
        return _triton(device, dtype)
    if device.type == "cpu" and dtype in NATIVE_TYPES:
        try:
            return _native(device, dtype)
        except BackendError as error:
            warnings.warn(f"{error} The reference backend serves, more slowly.", BackendWarning, stacklevel=2)
    return _module("reference").OPS


def _native(device: torch.device, dtype: torch.dtype) -> Backend:
    if device.type != "cpu" or dtype not in NATIVE_TYPES:
        raise BackendError(
            f"the native backend computes in float32 or bfloat16 on a CPU, not in {dtype} on {device.type!r}."
        )
    try:
        return _module("native").OPS
    except ImportError as error:
        raise BackendError(
            f"The native backend cannot be loaded: {error}; install embedgrad again where there is a C++17 compiler."
        ) from None


def _triton(device: torch.device, dtype: torch.dtype) -> Backend:
    if dtype == torch.float64:
        raise BackendError("the triton backend computes in float32 or bfloat16; use the backend reference for float64.")
    try:
        module = _module("triton")
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise BackendError("the triton backend needs the package triton; install it or use reference.") from None
    if device.type != "cuda" and not module.interpreted():
        raise BackendError(
            f"the triton backend runs on GPUs, not on {device.type!r}, unless TRITON_INTERPRET=1 is set before Python "
            "starts."
        )
    if dtype == torch.bfloat16 and module.interpreted():
        raise BackendError("Triton's interpreter gets bfloat16 products wrong; use float32, or unset TRITON_INTERPRET.")
    return module.OPS
