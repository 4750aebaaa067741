"""The C++ core and the CUDA sources, built by the host compiler and called with ctypes.

The CUDA sources build against `csrc/cuda/emulation`, so that their kernels run here. A device pointer is then a host
pointer, and both samplers take the same structs.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from embedgrad.backends.native_core import AdvanceBatch, SamplingBatch, SamplingParams
from embedgrad.generation.constrained import ForcedChoice
from embedgrad.generation.sampler import Penalties
from embedgrad.generation.sampling import Sampling

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS = ("cuda/sampler.cu", "cuda/token_entropy.cu", "cuda/advance.cu", "cuda/device_check.cu")
STATUS = ("sampled", "NaN", "+inf", "all -inf", "no candidate", "bad settings")
P = ctypes.c_void_p


def compiler() -> str | None:
    """The C++ compiler: what CXX names, or the first that is there."""
    wanted = os.environ.get("CXX")
    return wanted or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def build(folder: Path, flags: Sequence[str] = (), csrc: Path = CSRC, kernels: Sequence[Path] = ()) -> Path:
    """A shared library in `folder` of the sampler, its twins and the kernels (by default those of `csrc`), emulated.

    Raises CalledProcessError with the compiler's words.
    """
    library = folder / "libcore.so"
    sources = [csrc / "cpu/sampler.cpp", Path(__file__).with_name("twins.cpp"), csrc / "cuda/emulation/emulation.cpp"]
    files = [*map(str, sources), "-x", "c++", *map(str, kernels or [csrc / name for name in KERNELS])]
    flags = [f"-I{csrc}", "-std=c++17", "-O1", "-fPIC", "-shared", *flags]
    command = [*str(compiler()).split(), *flags, "-o", str(library), *files]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


@dataclass(frozen=True)
class Call:
    """What one call of a sampler is given: B rows, each drawing the number of its stream and step."""

    logits: np.ndarray  # [B, V] float32; rows may be further apart than V
    sampling: Sampling
    streams: Sequence[int] | np.ndarray | None = None  # default: the row's number
    steps: Sequence[int] | np.ndarray | None = None  # default: 0
    penalties: Penalties | None = None
    counts: np.ndarray | None = None  # [B, V]
    bias: np.ndarray | None = None  # [V], of every row
    choice: ForcedChoice | None = None
    nodes: Sequence[int] | None = None  # [B], -1: free
    reasons: Sequence[int] | None = None  # [B], not 0: the row has ended

    def with_(self, **changes: object) -> Call:
        return replace(self, **changes)  # type: ignore[arg-type]

    def row_options(self, row: int) -> dict:
        """The arguments of `embedgrad.generation.sampler.choose_token` for one row."""
        node = -1 if self.nodes is None else self.nodes[row]
        return {
            "stream": row if self.streams is None else int(self.streams[row]),
            "step": 0 if self.steps is None else int(self.steps[row]),
            "penalties": self.penalties,
            "counts": None if self.counts is None else self.counts[row],
            "bias": self.bias,
            "candidates": None if self.choice is None or node < 0 else self.choice.candidates(node),
        }


def params_of(s: Sampling, penalties: Penalties | None = None) -> SamplingParams:
    """The settings of one row."""
    p = penalties or Penalties()
    return SamplingParams(s.temperature, s.top_k, s.top_p, s.min_p, p.repetition, p.presence, p.frequency, s.seed)


def pointer(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


class Core:
    """The library's functions, on numpy arrays. `device` is "cpu" or "cuda" (emulated)."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.embedgrad_random_bits.restype = ctypes.c_uint64
        self.lib.embedgrad_random_bits.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32]
        self.lib.embedgrad_weight.restype = ctypes.c_uint64
        self.lib.embedgrad_weight.argtypes = [ctypes.c_float]
        self.lib.embedgrad_emulation_seed.argtypes = [ctypes.c_uint64]

    def emulation_error(self) -> str:
        """The first fault that the emulation has seen since it was last asked."""
        message = ctypes.create_string_buffer(1000)
        self.lib.embedgrad_emulation_error(message, len(message))
        return message.value.decode()

    def raw_sample(self, device: str, batch: SamplingBatch) -> int:
        if device == "cpu":
            return self.lib.embedgrad_sample_cpu(ctypes.byref(batch))
        return self.lib.embedgrad_sample_cuda(ctypes.byref(batch), None)

    def sample(self, device: str, call: Call) -> tuple[list[int], list[str]]:
        """The tokens and the statuses of all rows."""
        rows, vocabulary = call.logits.shape
        assert call.logits.dtype == np.float32
        assert call.logits.strides[1] == 4
        tokens, status = np.full(rows, -7, np.int32), np.full(rows, -7, np.int32)
        streams = np.asarray(range(rows) if call.streams is None else call.streams, np.uint64)
        steps = np.asarray([0] * rows if call.steps is None else call.steps, np.uint32)
        counts = None if call.counts is None else np.ascontiguousarray(call.counts, np.int32)
        bias = None if call.bias is None else np.ascontiguousarray(call.bias, np.float32)
        nodes = None if call.nodes is None else np.asarray(call.nodes, np.int32)
        reasons = None if call.reasons is None else np.asarray(call.reasons, np.int32)
        tree = call.choice
        params = (SamplingParams * rows)(*[params_of(call.sampling, call.penalties)] * rows)
        bias_rows = None if bias is None else np.zeros(rows, np.int32)
        batch = SamplingBatch(
            ctypes.addressof(params),
            pointer(call.logits),
            call.logits.strides[0] // 4 if rows > 1 else vocabulary,
            rows,
            vocabulary,
            *(pointer(a) for a in (streams, steps, counts, bias, bias_rows, nodes)),
            pointer(None if tree is None else tree.children),
            pointer(None if tree is None else tree.child_tokens),
            *(pointer(a) for a in (reasons, tokens, status)),
        )
        error = self.raw_sample(device, batch)
        fault = self.emulation_error()
        assert not fault, fault
        assert error == 0
        return tokens.tolist(), ["left alone" if n == -7 else STATUS[n] for n in status]

    def advance(self, device: str, batch: AdvanceBatch) -> None:
        if device == "cpu":
            self.lib.embedgrad_advance_cpu(ctypes.byref(batch))
        else:
            assert self.lib.embedgrad_advance_cuda(ctypes.byref(batch), None) == 0

    def token_entropy(
        self, device: str, logits: np.ndarray, tokens: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Entropy [B] and log-probability [B] of `logits` [B, V]."""
        rows, vocabulary = logits.shape
        entropy, log_p = np.full((2, rows), -7, np.float32)
        arguments = [P(logits.ctypes.data), ctypes.c_int64(vocabulary), rows, vocabulary, P(pointer(tokens))]
        arguments += [P(entropy.ctypes.data), P(log_p.ctypes.data)]
        if device == "cpu":
            self.lib.embedgrad_token_entropy_cpu(*arguments)
        else:
            assert self.lib.embedgrad_token_entropy_cuda(*arguments, None) == 0, self.emulation_error()
        return entropy, log_p
