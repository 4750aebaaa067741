"""How many bytes a step needs, by policy and weight type, without running it.

For the activations the decoder itself is walked with operations that compute nothing and an arena that has no memory
behind it, so the figure is what the real arena will hand out, to the byte. The weights are counted from their shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from embedgrad.errors import ConfigError
from embedgrad.model.arena import Arena
from embedgrad.model.config import ModelConfig
from embedgrad.model.decoder import KEPT, Decoder
from embedgrad.model.step import Step
from embedgrad.model.weights import LayerWeights, Weights
from embedgrad.tree import TreeMask

META = torch.device("meta")
POLICIES = tuple(KEPT)  # from most memory to least
GROUP = 32  # elements of a quantised group, and its bytes: quants, a float16 scale, and int4's float16 offset
GROUP_BYTES = {"int8": GROUP + 2, "int4": GROUP // 2 + 4}


@dataclass(frozen=True)
class StepSize:
    """tokens T, kept keys K, predicting rows R (None: the last layer runs at all tokens), prompt positions P (None:
    the first layer is differentiated at all tokens), targets N."""

    tokens: int
    kept: int
    rows: int | None
    prompt_positions: int | None
    targets: int


def activation_bytes(
    config: ModelConfig, size: StepSize, dtype: torch.dtype, policy: str | None, ops: ModuleType | None = None
) -> int:
    """Peak bytes in the arena of one step: forward and backward, or forward only with `policy` None.

    ops: the backend, whose operations take their workspace from the arena, too (None: one that takes none).
    """
    return _activation_bytes(config, size, dtype, policy, ops, torch.get_num_threads())


@lru_cache(maxsize=512)
def _activation_bytes(
    config: ModelConfig, size: StepSize, dtype: torch.dtype, policy: str | None, ops: ModuleType | None, threads: int
) -> int:
    arena = Arena(META)
    arena.begin(1 << 60)
    weights = _shapes(config)
    planned = _Nothing(ops)
    decoder = Decoder(config, weights, cast(Any, planned), dtype, arena)
    step = _step(config, size, dtype)
    hidden = decoder.forward(torch.empty(0, config.hidden_size, device=META), step, policy)
    gathered, loss = size.targets != len(hidden), (size.targets, config.hidden_size)
    with arena.frame():
        if gathered:
            (arena.scratch if policy is None else arena.keep)(*loss, dtype=dtype)
        if policy is not None:
            dh = arena.keep(*loss, dtype=dtype)
        arena.scratch(planned.linear_cross_entropy_bytes(size.targets, config.vocab_size, dtype), dtype=torch.uint8)
    if policy is not None:
        if gathered:
            dh = arena.keep(*hidden.shape, dtype=dtype)
            with arena.frame():
                arena.scratch(*hidden.shape, dtype=decoder.sum_dtype)
        decoder.backward(dh, step, torch.empty(0, device=META))
    return arena.peak


@dataclass(frozen=True)
class DeviceBytes:
    """Peak bytes on the device: weights, activations (the arena), keys and values of the kept units, and workspace
    (partial sums of the loss, D and partial dK and dV of the attention's backward: an upper bound)."""

    weights: int
    activations: int
    kept: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.kept + self.workspace


def device_bytes(
    config: ModelConfig, size: StepSize, dtype: torch.dtype, policy: str, weights: str = "compute", arch: str = "sm_90"
) -> DeviceBytes:
    """Peak device memory of one step on the backend triton.

    weights: "compute" (all in `dtype`), "int8" or "int4" (the table in `dtype`, as of a file that stores it so). arch:
    whose launch parameters decide about the workspace. Not counted: the step's index tensors and the attention's work
    lists (some hundred bytes a token), and what the driver and the allocator keep for themselves.
    """
    kept = config.num_layers * 2 * size.kept * config.num_kv_heads * config.head_dim * dtype.itemsize
    return DeviceBytes(
        weight_bytes(config, dtype, weights),
        activation_bytes(config, size, dtype, policy),
        kept,
        _workspace(config, size, dtype, arch),
    )


def weight_bytes(config: ModelConfig, dtype: torch.dtype, weights: str = "compute") -> int:
    """Bytes of all frozen parameters as `read_weights` stores them in the form `weights`.

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


def _workspace(config: ModelConfig, size: StepSize, dtype: torch.dtype, arch: str) -> int:
    """The larger of what the loss and what one layer's attention allocates; they are never there together."""
    from embedgrad.kernels import launch, linear_cross_entropy, tree_attention

    d, dim, groups = config.hidden_size, config.head_dim, config.num_kv_heads
    options = launch.options("linear_cross_entropy", arch, dtype=dtype, width=d)
    loss = linear_cross_entropy.workspace_bytes(size.targets, d, config.vocab_size, options, True)
    dkv = launch.options("tree_attention_backward_dkv", arch, dtype=dtype, head_dim=dim)
    rows = 2 * (size.tokens * config.num_heads + groups * (dkv["BLOCK_Q"] + 4))
    slots = 4 * max(dkv["PROGRAMS"], groups) * dkv["BLOCK_K"] * tree_attention.block_width(dim)
    return max(loss, 4 * (rows + slots))


def choose_policy(
    config: ModelConfig, size: StepSize, dtype: torch.dtype, policy: str, budget: int, ops: ModuleType | None = None
) -> tuple[str, int]:
    """The policy to use and its bytes. "auto" takes the first of `POLICIES` that stays within `budget` bytes.

    Raises ConfigError when the policy asked for, or the leanest one, needs more than `budget`.
    """
    wanted = POLICIES if policy == "auto" else (policy,)
    if policy not in ("auto", *POLICIES):
        raise ConfigError(f"unknown memory policy {policy!r}; choose one of auto, {', '.join(POLICIES)}.")
    needed = 0
    for name in wanted:
        needed = activation_bytes(config, size, dtype, name, ops)
        if needed <= budget:
            return name, needed
    raise ConfigError(
        f"a step of {size.tokens} tokens needs {needed:,} bytes of activations with policy {wanted[-1]!r}, but "
        f"{budget:,} are allowed; use a smaller batch{'' if wanted[-1] == 'layer' else ', policy layer'} or a larger "
        "memory budget."
    )


class _Nothing:
    """Operations that compute nothing, and the memory that those of `ops` take."""

    def __init__(self, ops: ModuleType | None) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_bytes"):
            return getattr(self._ops, name) if self._ops is not None else lambda *_, **__: 0
        return lambda *args, **kwargs: kwargs.get("out", kwargs.get("grad"))


class _Shape:
    """A frozen matrix of which only the verbs are there."""

    parts = ()
    bias = None

    def forward(self, x: Tensor, out: Tensor, *, add: Tensor | None = None) -> Tensor:
        return out

    def backward(self, dy: Tensor, out: Tensor) -> Tensor:
        return out


def _shapes(config: ModelConfig) -> Weights:
    matrix, vector = cast(Any, _Shape()), torch.empty(0, device=META)
    layer = LayerWeights(vector, matrix, matrix, matrix, vector, vector, matrix, vector, matrix, matrix)
    return Weights(vector, [layer] * config.num_layers, vector, matrix)


def _step(config: ModelConfig, size: StepSize, dtype: torch.dtype) -> Step:
    def index(n: int | None) -> Tensor | None:
        return None if n is None else torch.empty(n, dtype=torch.int64, device=META)

    mask = SimpleNamespace(kept=size.kept)
    mask.select_queries = mask.select_keys = lambda chosen: mask
    tokens = torch.empty(size.tokens, dtype=torch.int64, device=META)
    rotation = torch.empty(size.tokens, config.head_dim // 2, dtype=dtype, device=META)
    kept = torch.empty(config.num_layers, 2, size.kept, config.num_kv_heads, config.head_dim, dtype=dtype, device=META)
    return Step(
        ids=tokens,
        prompt_rows=tokens,
        cos=rotation,
        sin=rotation,
        masks={window: cast(TreeMask, mask) for window in config.windows},
        last_mask=cast(TreeMask, mask),
        kept=(kept,) if size.kept else (),
        rows=index(size.rows),
        prompt_positions=index(size.prompt_positions),
        prompt_keys=index(size.prompt_positions),
    )
