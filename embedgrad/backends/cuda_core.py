"""The CUDA library of csrc/cuda, as ctypes sees it: choosing tokens, advancing sequences and entropies on a GPU.

Its functions take device addresses and a stream, launch, and return a number: 0, or what is wrong
(`csrc/cuda/api.h`, SamplingError in `csrc/common/sampling.h`). The structs are those of `native_core`.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

from embedgrad.util.errors import BackendError


def library_path() -> Path:
    """Where the compiled library lies. Raises ImportError where csrc/cuda was not built."""
    path = Path(__file__).parents[1] / "_cuda.so"
    if not path.is_file():
        raise ImportError("csrc/cuda was not built: nvcc was not there when embedgrad was installed")
    return path


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled library's functions; needs no GPU and no driver. Raises ImportError where it cannot be loaded."""
    path = library_path()
    try:
        return declared(ctypes.CDLL(str(path)))
    except OSError as error:
        raise ImportError(f"csrc/cuda cannot be loaded: {error}") from error


def library_for(device: torch.device) -> ctypes.CDLL:
    """The library, where its kernels run on `device`. Raises ImportError: not built, no GPU of NVIDIA's that it has
    code for, or a driver that is too old for the CUDA release it was built with."""
    core = library()
    if torch.version.cuda is None or device.type != "cuda":
        raise ImportError(f"csrc/cuda is for GPUs of NVIDIA, not for {device.type!r} of this torch")
    said = ctypes.create_string_buffer(200)
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # torch's context is the current one from here on
        if core.embedgrad_problem_cuda(said, len(said)):
            raise ImportError(f"csrc/cuda does not run on {torch.cuda.get_device_name(device)}: {said.value.decode()}")
    return core


def declared(core: ctypes.CDLL) -> ctypes.CDLL:
    """`core` with the types of its functions."""
    types: dict[str, list[type]] = {
        "embedgrad_problem_cuda": [c_char_p, c_int32],
        "embedgrad_sample_cuda": [c_void_p, c_void_p],
        "embedgrad_advance_cuda": [c_void_p, c_void_p],
        "embedgrad_token_entropy_cuda": [
            c_void_p, c_int64, c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_void_p,
        ],
    }  # fmt: skip
    for name, arguments in types.items():
        function = getattr(core, name)
        function.restype, function.argtypes = c_int32, arguments
    return core


def check(number: int, function: str) -> None:
    """Raises BackendError where a call of the library was refused or could not be launched."""
    if number:
        raise BackendError(f"csrc/cuda: {function} failed (number {number} in csrc/common/sampling.h).")
