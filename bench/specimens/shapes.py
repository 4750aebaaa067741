"""Sizes of the models and of the token tree that the specimens stand for, and tensors of those sizes."""

from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS = 4096
"""Packed tokens of one step."""

TRUNK, BRANCHES = 256, 16
"""The tree of these tokens: a trunk (chat header and prompt), and branches of equal length behind it."""

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
    groups: int
    head_dim: int
    vocabulary: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.groups) * self.head_dim


QWEN_1_5B = Model("Qwen2.5-Math-1.5B", 1536, 8960, 12, 2, 128, 151936)
QWEN_7B = Model("Qwen2.5-Math-7B", 3584, 18944, 28, 4, 128, 152064)
MODELS = (QWEN_1_5B, QWEN_7B)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = (*((QWEN_1_5B, dtype) for dtype in TYPES), (QWEN_7B, torch.bfloat16))
"""Which sizes in which types: another width changes no instruction but the number of blocks, so 7B is tried in one."""


def untouched(*shape: int, dtype: torch.dtype) -> Tensor:
    """A CPU tensor whose memory is only reserved: nothing here reads or writes it, so size costs nothing."""
    return torch.empty(shape, dtype=dtype)


def tree(tokens: int = TOKENS, trunk: int = TRUNK, branches: int = BRANCHES) -> tuple[Tensor, Tensor]:
    """key_begin and key_end [tokens] int32 of a trunk with branches (the last one takes the remainder)."""
    begin = torch.arange(tokens, dtype=torch.int32)
    end = torch.full((tokens,), tokens, dtype=torch.int32)
    length = (tokens - trunk) // branches
    for i in range(branches):
        start = trunk + i * length
        stop = tokens if i == branches - 1 else start + length
        end[start:stop] = stop
    return begin, end


def visible_pairs(begin: Tensor, end: Tensor) -> int:
    """How many (query, key) pairs see each other when every token is a query."""
    return int((end.long() - begin.long()).sum())


def size(*tensors: tuple[int, torch.dtype]) -> int:
    """Bytes of so many elements of each type."""
    return sum(n * dtype.itemsize for n, dtype in tensors)


def values(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal values in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output in which every element that is not written shows."""
    return torch.full(shape, float("nan"), dtype=dtype)
