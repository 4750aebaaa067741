"""Specimens of the attention kernels: a trunk with sixteen branches at real sizes, small odd trees for the emulator."""

from collections.abc import Callable
from dataclasses import replace

import torch
from embedgrad.kernels.decode_attention import decode_attention
from embedgrad.kernels.tree_attention import tree_attention
from embedgrad.kernels.tree_attention_backward import tree_attention_backward
from embedgrad.kernels.tree_schedule import TreeSchedule
from torch import Tensor

from bench.capture import Launch
from embedgrad.backends import reference
from embedgrad.tree import TreeMask

from . import Cost, Specimen, Tensors, Trial
from .shapes import CASES, QWEN_1_5B, TOKENS, Model, poisoned, size, tree, untouched, values, visible_pairs

# Other head dimensions that the kernels promise: SmolLM2 and Llama-3.2-1B, Phi-2, the widest.
OTHERS = (
    replace(QWEN_1_5B, name="head_dim 64", heads=9, groups=3, head_dim=64),
    replace(QWEN_1_5B, name="head_dim 80", heads=32, groups=32, head_dim=80),
    replace(QWEN_1_5B, name="head_dim 256", heads=8, groups=4, head_dim=256),
)


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


def _backward_cost(m: Model, dtype: torch.dtype, launches: list[Launch]) -> Cost:
    by_name = {launch.name: launch for launch in launches}
    by_rows, by_keys = by_name["tree_attention_dq_kernel"], by_name["tree_attention_dkv_kernel"]
    rows, keys = (TOKENS * n * m.head_dim for n in (m.heads, m.groups))
    statistics = size((2 * TOKENS * m.heads, torch.float32))
    mask = size((3 * TOKENS, torch.int32))
    least = size((4 * rows + 4 * keys, dtype)) + statistics // 2 + mask
    # dQ: do and q once; a tile of K and V for each tile of scores.
    b, tiles = by_rows.blocks, _tiles(by_rows)
    moved = size((2 * rows + 2 * rows, dtype)) + 2 * statistics + size((rows, dtype))
    moved += tiles * b["BLOCK_K"] * size((2 * m.head_dim, dtype), (2, torch.int32))
    done = 6 * tiles * b["BLOCK_Q"] * b["BLOCK_K"] * b["BLOCK_D"]
    # dK, dV: K and V once for each piece; a tile of do and q, D and lse, for each tile of scores; slots and back.
    b, table = by_keys.blocks, by_keys.arguments["pieces"].long()
    used = table[table[:, 0] >= 0]
    tiles = int(((used[:, 2] - used[:, 1] + b["BLOCK_Q"] - 1) // b["BLOCK_Q"]).sum()) * m.groups
    slots = int((used[:, 5] >= 0).sum()) * m.groups
    moved += len(used) * m.groups * b["BLOCK_K"] * size((2 * m.head_dim, dtype))
    moved += tiles * b["BLOCK_Q"] * size((2 * m.head_dim, dtype), (3, torch.float32))
    moved += 2 * slots * 2 * b["BLOCK_K"] * b["BLOCK_D"] * 4 + size((2 * keys, dtype))
    done += 8 * tiles * b["BLOCK_Q"] * b["BLOCK_K"] * b["BLOCK_D"]
    return Cost(least, moved, 10 * m.heads * m.head_dim * visible_pairs(*tree()), done)


def _backward(m: Model, dtype: torch.dtype, window: int | None = None, softcap: float | None = None) -> Specimen:
    q, o, do, dq = (untouched(TOKENS, m.heads, m.head_dim, dtype=dtype) for _ in range(4))
    k, v, dk, dv = (untouched(TOKENS, m.groups, m.head_dim, dtype=dtype) for _ in range(4))
    lse = untouched(TOKENS, m.heads, dtype=torch.float32)
    schedule, scale = _schedule(window), m.head_dim**-0.5

    def run() -> None:
        tree_attention_backward(do, q, k, v, o, lse, schedule, scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv)

    model = m.name + (" window" if window else "") + (" softcap" if softcap else "")
    return Specimen(
        "tree_attention_backward", model, dtype, run, lambda a: _backward_cost(m, dtype, a), matrix=True,
        kernels=("tree_attention_dq_kernel", "tree_attention_dkv_kernel"),
    )  # fmt: skip


DECODING, TRUNK_KEYS, OWN_KEYS = 32, 512, 512
"""Sequences that decode at once, keys of their common trunk, and keys of each one's own."""


def _decode(m: Model, dtype: torch.dtype) -> Specimen:
    q, out = (untouched(DECODING, m.heads, m.head_dim, dtype=dtype) for _ in range(2))
    trunk_k, trunk_v = (untouched(TRUNK_KEYS, m.groups, m.head_dim, dtype=dtype) for _ in range(2))
    own_k, own_v = (untouched(DECODING, OWN_KEYS, m.groups, m.head_dim, dtype=dtype) for _ in range(2))
    lengths = torch.full((DECODING,), OWN_KEYS, dtype=torch.int32)

    def run() -> None:
        decode_attention(q, trunk_k, trunk_v, own_k, own_v, lengths, scale=m.head_dim**-0.5, out=out)

    def cost(launches: list[Launch]) -> Cost:
        trunk, own, _merge = launches
        queries, width = DECODING * m.heads * m.head_dim, m.groups * m.head_dim
        shared, private = 2 * TRUNK_KEYS * width, 2 * DECODING * OWN_KEYS * width
        parts = (trunk.grid[1] + own.grid[1]) * DECODING * m.heads * (m.head_dim + 2) * 4
        rows, group = trunk.blocks["BLOCK_Q"], m.heads // m.groups
        tiles = trunk.grid[0] * rows * TRUNK_KEYS + DECODING * own.blocks["BLOCK_H"] * OWN_KEYS
        return Cost(
            least=size((2 * queries + shared + private, dtype), (DECODING, torch.int32)),
            moved=size((trunk.grid[0] * shared + private, dtype)) + 2 * parts
            + size(((trunk.grid[1] + own.grid[1] + 1) * queries, dtype)),
            useful=4 * DECODING * m.heads * m.head_dim * (TRUNK_KEYS + OWN_KEYS),
            done=4 * tiles * m.groups * trunk.blocks["BLOCK_D"] if group else 0,
        )  # fmt: skip

    return Specimen(
        "decode_attention", m.name, dtype, run, cost, matrix=True, kernels=("decode_trunk_kernel", "decode_own_kernel")
    )


def specimens() -> list[Specimen]:
    """Every attention kernel at both models' sizes and at other head dimensions, in each type."""
    cases = (*CASES, *((m, dtype) for m in OTHERS for dtype in (torch.bfloat16, torch.float32)))
    plain = [maker(m, dtype) for maker in (_forward, _backward, _decode) for m, dtype in cases]
    masked = [maker(QWEN_1_5B, torch.bfloat16, window=512, softcap=50.0) for maker in (_forward, _backward)]
    return [*plain, *masked]


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

    def backward(a: Tensors, op: Callable[..., object], mask: object) -> dict[str, Tensor]:
        dtype = a["q"].dtype
        saved = forward(a, reference.tree_attention, small.mask())
        grads = {"dq": poisoned(n, h, d, dtype=dtype)}
        grads |= {name: poisoned(s - small.kept, g_heads, d, dtype=dtype) for name in ("dk", "dv")}
        inner = (a["do"], a["q"], a["k"], a["v"], saved["out"], saved["lse"])
        op(*inner, mask, scale=scale, softcap=softcap, **grads)
        return grads

    return [
        Trial(
            "tree_attention", case, inputs,
            lambda a: forward(a, tree_attention, small.schedule()),
            lambda a: forward(a, reference.tree_attention, small.mask()),
            useful=4 * h * d * small.pairs(),
        ),
        Trial(
            "tree_attention_backward", case, inputs,
            lambda a: backward(a, tree_attention_backward, small.schedule()),
            lambda a: backward(a, reference.tree_attention_backward, small.mask()),
            useful=10 * h * d * small.pairs(),
        ),
    ]  # fmt: skip


def _decode_trial(batch: int, trunk: int, own: int, heads: tuple[int, int, int], softcap: float | None = None) -> Trial:
    h, g_heads, d = heads

    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, own + 1, (batch,), generator=g)
        shared = {name: values(g, trunk, g_heads, d) for name in ("trunk_k", "trunk_v")}
        private = {name: values(g, batch, own, g_heads, d) for name in ("own_k", "own_v")}
        return {"q": values(g, batch, h, d), **shared, **private, "own_lengths": lengths}

    def run(a: Tensors, op: Callable[..., object]) -> dict[str, Tensor]:
        out = poisoned(batch, h, d, dtype=a["q"].dtype)
        op(**a, scale=d**-0.5, softcap=softcap, out=out)
        return {"out": out}

    return Trial(
        "decode_attention", f"B={batch} trunk {trunk} own {own} D={d}" + " softcap" * (softcap is not None), inputs,
        lambda a: run(a, decode_attention), lambda a: run(a, reference.decode_attention),
        useful=4 * batch * h * d * (trunk + own),
    )  # fmt: skip


def trials() -> list[Trial]:
    """A trunk with branches, kept keys, GQA, a window with a softcap, a head dimension between powers of two."""
    return [
        *_trials_of("70 tokens GQA D=64", _SmallTree(70, 20, 4, 0, None), (6, 2, 64)),
        *_trials_of("150 tokens kept 9 D=128", _SmallTree(150, 37, 5, 9, None), (4, 2, 128)),
        *_trials_of("50 tokens window 11 softcap D=80", _SmallTree(50, 13, 3, 3, 11), (2, 1, 80), 20.0),
        *_trials_of("1 token D=32", _SmallTree(1, 1, 1, 0, None), (1, 1, 32)),
        _decode_trial(3, 70, 37, (6, 2, 64)),
        _decode_trial(5, 33, 9, (2, 2, 80), softcap=20.0),
        _decode_trial(1, 1, 1, (1, 1, 32)),
    ]
