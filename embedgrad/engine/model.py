"""A frozen model, ready to be asked for losses, gradients and text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NoReturn, SupportsIndex

import torch
from torch import Tensor

from embedgrad import backends
from embedgrad.backends.base import Backend
from embedgrad.engine.arena import Arena
from embedgrad.engine.decoder import Decoder
from embedgrad.engine.memory import plan_memory
from embedgrad.engine.native_decoder import NativeDecoder
from embedgrad.engine.packed_pass import PassSize
from embedgrad.engine.prefix_cache import LastPrefix, PrefixCache
from embedgrad.model.checkpoint import Checkpoint, read_checkpoint
from embedgrad.model.config import ModelConfig
from embedgrad.model.files.hub import resolve
from embedgrad.model.fingerprint import Fingerprint
from embedgrad.model.read_weights import read_weights
from embedgrad.model.tokenizer import Tokenizer
from embedgrad.model.weights import Weights
from embedgrad.util.errors import BackendError, ConfigError, ModelError
from embedgrad.util.fair_lock import FairLock
from embedgrad.util.host import available_memory

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float64": torch.float64, "fp64": torch.float64,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip
WEIGHTS = ("auto", "compute", "stored", "fp32", "bf16", "int8", "int4")


class Model:
    """Frozen weights, tokenizer and decoder. `dtype` is what is computed in; `name` is for people and prompt files.

    fingerprint: tells its weights from those of other models, such as fine-tunes of it.

    Several threads may use one model. A pass or a generation holds `lock`, because it works in memory that belongs to
    the model: the arena, the caches of prefixes, the buffers of the matrices, the native decoder. A thread that holds
    the lock may take it again, so a callback may use the model that called it.
    """

    def __init__(
        self, checkpoint: Checkpoint, weights: Weights, ops: Backend, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config: ModelConfig = checkpoint.config
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self.name = checkpoint.name
        self.fingerprint = Fingerprint.of(checkpoint)
        self.weights = weights
        self.ops = ops
        self.backend = ops.name
        self.dtype = dtype
        self.device = device
        self.lock = FairLock()
        self.arena = Arena(device)
        self.decoder = Decoder(self.config, weights, ops, dtype, self.arena)
        self.prefix_cache = PrefixCache(self.decoder)
        self.last_prefix = LastPrefix()

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {self.config.family}, {self.dtype}, backend={self.backend!r}, {self.device})"

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> NoReturn:
        """Raises ModelError: `pickle` and `copy` would copy the weights, and memory that compiled code points to."""
        raise ModelError(
            f"the model {self.name!r} cannot be pickled or copied; share it between threads, and open it with "
            "load_model in every process that needs it."
        )

    @cached_property
    def native_decoder(self) -> NativeDecoder | None:
        """What decodes tokens in csrc/, where the backend is native and has products for the weights as stored."""
        if self.backend != "native" or self.dtype != torch.float32 or self.device.type != "cpu":
            return None
        return NativeDecoder.of(self.config, self.weights)

    def embedding_rows(self, ids: Sequence[int] | Tensor, /) -> Tensor:
        """Rows of the embedding matrix for token ids: [n, d] float32 on the CPU."""
        index = torch.as_tensor(ids, dtype=torch.int64, device=self.device)
        return self.weights.embedding[index].float().cpu()

    def embedding_table_chunks(self, rows: int = 8192) -> Iterator[tuple[int, Tensor]]:
        """The embedding matrix as (first row, [n, d] float32 on the CPU), `rows` at a time."""
        for start in range(0, len(self.weights.embedding), rows):
            yield start, self.weights.embedding[start : start + rows].float().cpu()

    def weights_hash(self) -> str:
        """sha256 over every frozen tensor, hexadecimal: equal before and after an optimisation."""
        with self.lock:  # layers that are streamed pass through shared buffers
            return self.weights.hash()

    @property
    def quantisation_errors(self) -> dict[str, float]:
        """‖W − Ŵ‖/‖W‖ (Frobenius) of every tensor that was quantised when the model was loaded, by name."""
        return self.weights.quantisation_errors

    def plan_memory(
        self, sizes: Sequence[PassSize], policy: str | None, memory_budget: int | None = None
    ) -> tuple[str | None, int]:
        """The memory policy for passes of these sizes, and the bytes that the arena needs for the largest.

        policy, memory_budget: as `loss_and_grad` takes them; policy None for passes that only go forward. Raises
        ConfigError.
        """
        return plan_memory(self.config, sizes, self.dtype, self.device, policy, memory_budget, self.ops)

    def release_memory(self) -> None:
        """Give the activation arena and the prefixes' keys and values back; the next step allocates them again."""
        with self.lock:
            self.arena.release()
            self.prefix_cache.clear()
            self.last_prefix.clear()


def load_model(
    path_or_id: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    device: str | torch.device = "auto",
    weights: str = "auto",
    max_device_memory: int | None = None,
    long_context: bool = False,
) -> Model:
    """Open a Hugging Face folder, a .gguf file, or a hub id.

    dtype: what is computed in (default float32 on a CPU, bfloat16 on a GPU); float64 for checks. With bfloat16 on a CPU
    activations are stored so, and products and sums are float32. weights: "compute" brings every matrix to that type
    once, "fp32" and "bf16" to these types; "stored" keeps it as the file has it, memory-mapped, GGUF's blocks as blocks
    (see `read_weights`); "int8" and "int4" quantise the matrices while they are read. What is not in the type of the
    products is widened to it tile by tile for each. "auto" is "compute" where that takes less than half of the free
    memory, else "stored". max_device_memory: bytes that the weights may take on the device (default, on a GPU: three
    quarters of what is free, where they are larger than that); blocks that do not fit are streamed from host memory.
    long_context: of a model with LongRoPE, the rotations for texts beyond its original context, for all texts.

    Raises ModelError (cannot be read, not supported, NaN or infinity in the weights), BackendError, ConfigError
    (unknown dtype or weights, or a max_device_memory that is too small for two blocks).
    """
    chosen_device = _device(device)
    chosen_dtype = _dtype(dtype, chosen_device)
    ops = backends.choose(backend, chosen_device, chosen_dtype)
    if weights not in WEIGHTS:
        raise ConfigError(f"unknown weights {weights!r}; choose one of {', '.join(WEIGHTS)}.")
    checkpoint = read_checkpoint(resolve(path_or_id), long_context=long_context)
    wide_bytes = sum(torch.Size(shape).numel() for shape in checkpoint.config.shapes().values()) * chosen_dtype.itemsize
    free = available_memory(chosen_device)
    if weights == "auto":
        weights = "compute" if wide_bytes < free // 2 else "stored"
    if max_device_memory is None and chosen_device.type == "cuda" and wide_bytes > free * 3 // 4:
        max_device_memory = free * 3 // 4
    frozen = read_weights(
        checkpoint.config, checkpoint.tensors, chosen_dtype, chosen_device, form=weights,
        products=ops if ops.quantized_rows else None,
        max_device_memory=max_device_memory, where=checkpoint.name,
    )  # fmt: skip
    return Model(checkpoint, frozen, ops, chosen_dtype, chosen_device)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BackendError(f"the device {device!r} cannot be used here ({str(error).splitlines()[0]}).") from None
    return chosen


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ConfigError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
    return chosen
