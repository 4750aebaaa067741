"""Specimens of the attention kernels: a trunk with sixteen branches at real sizes, small odd trees for the emulator."""

from collections.abc import Callable
from dataclasses import replace

import torch
from embedgrad.kernels.tree_attention import tree_attention
from embedgrad.kernels.tree_schedule import TreeSchedule
from torch import Tensor

from bench.capture import Launch
from embedgrad.backends import reference
from embedgrad.tree import TreeMask

from . import Cost, Specimen, Tensors, Trial
from .shapes import MODELS, QWEN_1_5B, TOKENS, TYPES, Model, poisoned, size, tree, untouched, values, visible_pairs

# Other head dimensions that the kernels promise: SmolLM2 and Llama-3.2-1B, Phi-2, the widest.
OTHERS = (
    replace(QWEN_1_5B, name="head_dim 64", heads=9, groups=3, head_dim=64),
    replace(QWEN_1_5B, name="head_dim 80", heads=32, groups=32, head_dim=80),
    replace(QWEN_1_5B, name="head_dim 256", heads=8, groups=4, head_dim=256),
)
ALL = (*MODELS, *OTHERS)


def _schedule(window: int | None = None) -> TreeSchedule:
    begin, end = tree()
    positions = begin if window else None
    return TreeSchedule(begin, end, begin, 0, positions, positions, window)


def _tiles(launch: Launch) -> int:
    """Tiles (block of rows, block of keys) that the launch visits, over all groups."""
    return int(launch.arguments["block_counts"].sum()) * launch.grid[1]


def _forward_cost(m: Model, dtype: torch.dtype, launches: list[Launch]) -> Cost:
    (launch,) = launches
    rows, keys = (TOKENS * n * m.head_dim for n in (m.heads, m.groups))
    once = size((2 * rows, dtype), (TOKENS * m.heads, torch.float32), (TOKENS, torch.int32))
    blocks, tiles = launch.blocks, _tiles(launch)
    tile = blocks["BLOCK_K"] * (size((2 * m.head_dim, dtype)) + size((2, torch.int32)))
    products = 4 * m.heads * m.head_dim * visible_pairs(*tree())
    return Cost(
        least=once + size((2 * keys, dtype), (2 * TOKENS, torch.int32)),
        moved=once + tiles * tile,
        useful=products,
        done=4 * tiles * blocks["BLOCK_Q"] * blocks["BLOCK_K"] * blocks["BLOCK_D"],
    )


def _forward(m: Model, dtype: torch.dtype, window: int | None = None, softcap: float | None = None) -> Specimen:
    q, out = (untouched(TOKENS, m.heads, m.head_dim, dtype=dtype) for _ in range(2))
    k, v = (untouched(TOKENS, m.groups, m.head_dim, dtype=dtype) for _ in range(2))
    lse = untouched(TOKENS, m.heads, dtype=torch.float32)
    schedule, scale = _schedule(window), m.head_dim**-0.5

    def run() -> None:
        tree_attention(q, k, v, schedule, scale=scale, softcap=softcap, out=out, lse=lse)

    model = m.name + (" window" if window else "") + (" softcap" if softcap else "")
    return Specimen("tree_attention", model, dtype, run, lambda a: _forward_cost(m, dtype, a), matrix=True)


def specimens() -> list[Specimen]:
    """Every attention kernel at both models' sizes and at other head dimensions, in each type."""
    plain = [_forward(m, dtype) for m in ALL for dtype in TYPES]
    return [*plain, _forward(QWEN_1_5B, torch.bfloat16, window=512, softcap=50.0)]


class _SmallTree:
    """A tree of a few tokens with kept keys in front, and one branch whose first query sees no key."""

    def __init__(self, tokens: int, trunk: int, branches: int, kept: int, window: int | None) -> None:
        begin, end = tree(tokens, trunk, branches)
        self.index, self.kept, self.window = begin.clone(), kept, window
        self.begin = torch.cat([torch.zeros(kept, dtype=torch.int32), begin])
        self.end = torch.cat([torch.full((kept,), tokens, dtype=torch.int32), end])
        self.position = self.index + kept if window else None
        self.key_position = torch.arange(kept + tokens, dtype=torch.int32) if window else None

    def schedule(self) -> TreeSchedule:
        return TreeSchedule(self.begin, self.end, self.index, self.kept, self.position, self.key_position, self.window)

    def mask(self) -> TreeMask:
        return TreeMask(self.begin, self.end, self.index, self.kept, self.window, self.position, self.key_position)

    def pairs(self) -> int:
        return int(self.mask().visible().sum())


def _trials_of(case: str, small: _SmallTree, heads: tuple[int, int, int], softcap: float | None = None) -> list[Trial]:
    h, g_heads, d = heads
    n, s, scale = len(small.index), len(small.begin), d**-0.5

    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        queries = {name: values(g, n, h, d) for name in ("q", "do")}
        return queries | {name: values(g, s, g_heads, d) for name in ("k", "v")}

    def forward(a: Tensors, op: Callable[..., object], mask: object) -> dict[str, Tensor]:
        wide = torch.float64 if a["q"].dtype == torch.float64 else torch.float32
        out, lse = poisoned(n, h, d, dtype=a["q"].dtype), poisoned(n, h, dtype=wide)
        op(a["q"], a["k"], a["v"], mask, scale=scale, softcap=softcap, out=out, lse=lse)
        return {"out": out, "lse": lse}

    return [
        Trial(
            "tree_attention", case, inputs,
            lambda a: forward(a, tree_attention, small.schedule()),
            lambda a: forward(a, reference.tree_attention, small.mask()),
            useful=4 * h * d * small.pairs(),
        )
    ]  # fmt: skip


def trials() -> list[Trial]:
    """A trunk with branches, kept keys, GQA, a window with a softcap, a head dimension between powers of two."""
    return [
        *_trials_of("70 tokens GQA D=64", _SmallTree(70, 20, 4, 0, None), (6, 2, 64)),
        *_trials_of("150 tokens kept 9 D=128", _SmallTree(150, 37, 5, 9, None), (4, 2, 128)),
        *_trials_of("50 tokens window 11 softcap D=80", _SmallTree(50, 13, 3, 3, 11), (2, 1, 80), 20.0),
        *_trials_of("1 token D=32", _SmallTree(1, 1, 1, 0, None), (1, 1, 32)),
    ]
