"""How many bytes of activations a step needs, by policy, without running it.

The decoder itself is walked with operations that compute nothing and an arena that has no memory behind it, so the
figure is what the real arena will hand out, to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
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


@dataclass(frozen=True)
class StepSize:
    """tokens T, kept keys K, predicting rows R (None: the last layer runs at all tokens), prompt positions P (None:
    the first layer is differentiated at all tokens), targets N."""

    tokens: int
    kept: int
    rows: int | None
    prompt_positions: int | None
    targets: int


@lru_cache(maxsize=512)
def activation_bytes(config: ModelConfig, size: StepSize, dtype: torch.dtype, policy: str | None) -> int:
    """Peak bytes in the arena of one step: forward and backward, or forward only with `policy` None."""
    arena = Arena(META)
    arena.begin(1 << 60)
    weights = _shapes(config)
    decoder = Decoder(config, weights, cast(Any, _Nothing()), dtype, arena)
    step = _step(config, size, dtype)
    hidden = decoder.forward(torch.empty(0, config.hidden_size, device=META), step, policy)
    if policy is not None:
        if size.targets != len(hidden):
            arena.keep(size.targets, config.hidden_size, dtype=dtype)
            arena.keep(size.targets, config.hidden_size, dtype=dtype)
        dh = arena.keep(*hidden.shape, dtype=dtype)
        if size.targets != len(hidden):
            with arena.frame():
                arena.scratch(*hidden.shape, dtype=decoder.sum_dtype)
        decoder.backward(dh, step, torch.empty(0, device=META))
    return arena.peak


def choose_policy(
    config: ModelConfig, size: StepSize, dtype: torch.dtype, policy: str, budget: int
) -> tuple[str, int]:
    """The policy to use and its bytes. "auto" takes the first of `POLICIES` that stays within `budget` bytes.

    Raises ConfigError when the policy asked for, or the leanest one, needs more than `budget`.
    """
    wanted = POLICIES if policy == "auto" else (policy,)
    if policy not in ("auto", *POLICIES):
        raise ConfigError(f"unknown memory policy {policy!r}; choose one of auto, {', '.join(POLICIES)}.")
    needed = 0
    for name in wanted:
        needed = activation_bytes(config, size, dtype, name)
        if needed <= budget:
            return name, needed
    raise ConfigError(
        f"a step of {size.tokens} tokens needs {needed:,} bytes of activations with policy {wanted[-1]!r}, but "
        f"{budget:,} are allowed; use a smaller batch{'' if wanted[-1] == 'layer' else ', policy layer'} or a larger "
        "memory budget."
    )


class _Nothing:
    """Operations that compute nothing."""

    def __getattr__(self, name: str) -> Any:
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
    )
