"""The sizes of the specimens: models and a token tree; and tensors of those sizes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness import models
from embedgrad.backends.mask import TreeMask

TOKENS = 4096
"""Packed tokens of one step."""

SHARED, BRANCHES = 256, 16
"""The tree: one segment that all examples share (chat header and prompt), and branches of equal length behind it."""

TARGETS = 2048
"""Positions that predict a target: about half of each branch."""

PROMPT_ROWS = 64


@dataclass(frozen=True)
class Model:
    """The sizes that the kernels see."""

    name: str
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def _model(name: str) -> Model:
    c = models.config_of(name)
    return Model(name, c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size)


MODELS = QWEN_1_5B, QWEN_7B = _model(models.QWEN_1_5B), _model(models.QWEN_7B)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = (*((QWEN_1_5B, dtype) for dtype in TYPES), (QWEN_7B, torch.bfloat16))
"""Sizes and types. 7B is tried in one type only: another width changes the number of blocks and no instruction."""


def untouched(*shape: int, dtype: torch.dtype) -> Tensor:
    """A CPU tensor that nobody reads or writes. Its memory is only reserved, so its size costs nothing."""
    return torch.empty(shape, dtype=dtype)


def tree(
    tokens: int = TOKENS, shared: int = SHARED, branches: int = BRANCHES, prefix: int = 0, window: int | None = None
) -> TreeMask:
    """The mask of a tree behind `prefix` keys: a shared segment, and branches (the last one takes the remainder)."""
    begin = torch.arange(tokens, dtype=torch.int32)
    end = torch.full((tokens,), tokens, dtype=torch.int32)
    length = (tokens - shared) // branches
    for i in range(branches):
        start = shared + i * length
        stop = tokens if i == branches - 1 else start + length
        end[start:stop] = stop
    positions = torch.arange(prefix + tokens, dtype=torch.int32) if window else None
    return TreeMask(
        torch.cat([torch.zeros(prefix, dtype=torch.int32), begin]),
        torch.cat([torch.full((prefix,), tokens, dtype=torch.int32), end]),
        begin, prefix, window, None if positions is None else positions[prefix:], positions,
    )  # fmt: skip


def size(*tensors: tuple[int, torch.dtype]) -> int:
    """Bytes of so many elements of each type."""
    return sum(n * dtype.itemsize for n, dtype in tensors)


def values(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal values in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output full of NaN, so that an element that is not written shows."""
    return torch.full(shape, float("nan"), dtype=dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
