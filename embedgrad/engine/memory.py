"""How many bytes a pass needs, by policy and weight type, without running it.

For the activations the real code runs on tensors without memory, with operations that compute nothing; so the figure is
what the real arena will hand out, to the byte. The weights are counted from their shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from embedgrad.backends.base import Backend
from embedgrad.backends.logits import DEVICE_LOGIT_BYTES, logit_rows, padded
from embedgrad.engine.arena import Arena
from embedgrad.engine.decoder import SAVED_BY_POLICY, Decoder
from embedgrad.engine.loss import target_loss
from embedgrad.engine.packed_pass import PassSize, pass_of_size
from embedgrad.model.config import ModelConfig
from embedgrad.model.frozen import DEVICE_TILE_BYTES
from embedgrad.model.weights import LayerWeights, Weights
from embedgrad.util.errors import ConfigError
from embedgrad.util.host import available_memory

META = torch.device("meta")
POLICIES = tuple(SAVED_BY_POLICY)  # from most memory to least
GROUP = 32  # elements of a quantised group, and its bytes: quants, a float16 scale, and int4's float16 offset
GROUP_BYTES = {"int8": GROUP + 2, "int4": GROUP // 2 + 4}


def activation_bytes(
    config: ModelConfig, size: PassSize, dtype: torch.dtype, policy: str | None, ops: Backend | None = None
) -> int:
    """Peak bytes in the arena of one pass: forward and backward, or forward only with `policy` None.

    ops: the backend, whose operations take their workspace from the arena, too (None: one that takes none).
    """
    return _activation_bytes(config, size, dtype, policy, ops, torch.get_num_threads())


@lru_cache(maxsize=512)
def _activation_bytes(
    config: ModelConfig, size: PassSize, dtype: torch.dtype, policy: str | None, ops: Backend | None, threads: int
) -> int:
    arena = Arena(META)
    arena.begin(1 << 60)
    decoder = Decoder(config, _shapes(config), cast(Backend, _Nothing(ops)), dtype, arena)
    p = pass_of_size(config, size, dtype)
    hidden = decoder.forward(torch.empty(0, config.hidden_size, device=META), p, policy)
    _, _, dh = target_loss(decoder, decoder.weights.head, hidden, p.targets, differentiate=policy is not None)
    if dh is not None:
        decoder.backward(dh, p, torch.empty(0, device=META))
    return arena.peak


@dataclass(frozen=True)
class DeviceBytes:
    """Peak bytes on the device: weights, activations (the arena), keys and values of the prefix, and workspace (logits;
    D and partial dK and dV of the attention's backward: an upper bound; the tile of a quantised matrix)."""

    weights: int
    activations: int
    prefix: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations + self.prefix + self.workspace


def device_bytes(
    config: ModelConfig, size: PassSize, dtype: torch.dtype, policy: str, weights: str = "compute", arch: str = "sm_90"
) -> DeviceBytes:
    """Peak device memory of one step on the backend triton.

    weights: "compute" (all in `dtype`), "int8" or "int4" (the table in `dtype`, as of a file that stores it so). arch:
    whose launch parameters decide about the workspace. Not counted: the step's index tensors and the attention's work
    lists (some hundred bytes a token), and what the driver and the allocator keep for themselves.
    """
    prefix = config.num_layers * 2 * size.prefix * config.num_kv_heads * config.head_dim * dtype.itemsize
    return DeviceBytes(
        weight_bytes(config, dtype, weights),
        activation_bytes(config, size, dtype, policy),
        prefix,
        _workspace(config, size, dtype, arch) + (_largest_tile(config, dtype) if weights in GROUP_BYTES else 0),
    )


def weight_bytes(config: ModelConfig, dtype: torch.dtype, weights: str = "compute") -> int:
    """Bytes of all frozen parameters as `read_weights` stores them on a GPU in the form `weights`.

    Scales are taken to be float16; a matrix with groups too small for that has float32 ones.
    """
    total = 0
    for name, shape in config.shapes().items():
        if len(shape) == 2 and weights in GROUP_BYTES and name != "model.embed_tokens.weight":
            multiple = 2 if weights == "int4" else 1
            groups = -(-shape[1] // (GROUP * multiple)) * multiple
            total += shape[0] * groups * GROUP_BYTES[weights]
        else:
            total += torch.Size(shape).numel() * dtype.itemsize
    return total


def _workspace(config: ModelConfig, size: PassSize, dtype: torch.dtype, arch: str) -> int:
    """The larger of what the loss and what one layer's attention allocates; they are never there together."""
    from embedgrad.kernels import launch, tree_attention

    rows = logit_rows(size.targets, config.vocab_size, DEVICE_LOGIT_BYTES)
    loss = rows * padded(config.vocab_size) * 4
    dim, groups = config.head_dim, config.num_kv_heads
    dkv = launch.options("tree_attention_backward_dkv", arch, dtype=dtype, head_dim=dim)
    rows = 2 * (size.tokens * config.num_heads + groups * (dkv["BLOCK_Q"] + 4))
    slots = 4 * max(dkv["PROGRAMS"], groups) * dkv["BLOCK_K"] * tree_attention.block_width(dim)
    return max(loss, 4 * (rows + slots))


def _largest_tile(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the largest piece of a matrix that is dequantised at once."""
    largest = max(torch.Size(shape).numel() for shape in config.shapes().values() if len(shape) == 2)
    return min(2 * largest * dtype.itemsize, DEVICE_TILE_BYTES)


def plan_memory(
    config: ModelConfig,
    sizes: Sequence[PassSize],
    dtype: torch.dtype,
    device: torch.device,
    policy: str | None,
    budget: int | None = None,
    ops: Backend | None = None,
) -> tuple[str | None, int]:
    """The memory policy for passes of these sizes, and the bytes that the largest needs.

    policy: None (forward only), one of POLICIES, or "auto", which takes the first of them that stays within `budget`
    bytes (default: half of the memory that is free on `device`).

    Raises ConfigError where the policy is unknown, or where it, or the leanest one, needs more than `budget`.
    """

    def needed(policy: str | None) -> tuple[int, PassSize]:
        each = [(activation_bytes(config, size, dtype, policy, ops), size) for size in sizes]
        return max(each, key=lambda found: found[0])

    if policy is None:
        return None, needed(None)[0]
    if policy not in ("auto", *POLICIES):
        raise ConfigError(f"unknown memory policy {policy!r}; choose one of auto, {', '.join(POLICIES)}.")
    budget = available_memory(device) // 2 if budget is None else budget
    wanted = POLICIES if policy == "auto" else (policy,)
    for name in wanted:
        nbytes, largest = needed(name)
        if nbytes <= budget:
            return name, nbytes
    raise ConfigError(
        f"a step of {largest.tokens} tokens needs {nbytes:,} bytes of activations with policy {wanted[-1]!r}, but "
        f"{budget:,} are allowed; use a smaller batch{'' if wanted[-1] == 'layer' else ', policy layer'} or a larger "
        "memory budget."
    )


class _Nothing:
    """Operations that compute nothing, and the workspace that those of `ops` take.

    They pick no rows either: on tensors without memory, torch's index_select imports its compiler, which takes two
    seconds and 114 MB.
    """

    def __init__(self, ops: Backend | None) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_bytes"):
            return getattr(self._ops, name) if self._ops is not None else lambda *_, **__: 0
        if name == "linear_cross_entropy":
            return lambda *_, **__: (None, None)
        return lambda *args, **kwargs: next((kwargs[k] for k in ("out", "grad", "dx") if k in kwargs), args[0])


class _Shape:
    """A frozen matrix without data: its two verbs and, for a head, its number of rows."""

    bias = None

    def __init__(self, rows: int = 0) -> None:
        self.parts: tuple[Any, ...] = ()
        self.shape = (rows, 0)

    def forward(self, x: Tensor, out: Tensor, *, add: Tensor | None = None) -> Tensor:
        return out

    def backward(self, dy: Tensor, out: Tensor) -> Tensor:
        return out


def _shapes(config: ModelConfig) -> Weights:
    matrix, vector = cast(Any, _Shape()), torch.empty(0, device=META)
    norms = [None if name is None else vector for name in config.kind.norms]
    layer = LayerWeights(
        norms[0], matrix, matrix, matrix, vector, vector, matrix, norms[2], matrix, matrix, norms[1], norms[3]
    )
    return Weights(vector, [layer] * config.num_layers, vector, cast(Any, _Shape(config.vocab_size)))
