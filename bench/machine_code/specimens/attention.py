"""Attention: a tree with sixteen branches at real sizes, small odd trees for the emulator."""

from dataclasses import replace

import torch
from embedgrad.kernels import launch
from embedgrad.kernels.decode_attention import workspace_size
from torch import Tensor

from bench.machine_code.capture import Launch
from bench.machine_code.specimens.base import Cost, Specimen, Tensors, Trial
from bench.machine_code.specimens.shapes import (
    CASES,
    QWEN_1_5B,
    TOKENS,
    Model,
    poisoned,
    size,
    tree,
    untouched,
    values,
    wide,
)
from embedgrad.backends.base import Backend, Heads
from embedgrad.backends.mask import TreeMask
from embedgrad.backends.reference import OPS as reference
from embedgrad.backends.triton import OPS

# Other head dimensions that the kernels promise: SmolLM2 and Llama-3.2-1B, Phi-2, the widest.
OTHERS = (
    replace(QWEN_1_5B, name="head_dim 64", heads=9, kv_heads=3, head_dim=64),
    replace(QWEN_1_5B, name="head_dim 80", heads=32, kv_heads=32, head_dim=80),
    replace(QWEN_1_5B, name="head_dim 256", heads=8, kv_heads=4, head_dim=256),
)


def visible_pairs(mask: TreeMask) -> int:
    """How many (query, key) pairs see each other when every token is a query; without a window."""
    return int((mask.key_end.long() - mask.key_begin.long()).sum())


def _tiles(launch: Launch) -> int:
    """Tiles (block of rows, block of keys) that the launch visits, over all key/value heads."""
    return int(launch.arguments["block_counts"].sum()) * launch.grid[1]


def _named(m: Model, window: int | None, softcap: float | None) -> str:
    return m.name + (" window" if window else "") + (" softcap" if softcap else "")


def _forward(m: Model, dtype: torch.dtype, window: int | None = None, softcap: float | None = None) -> Specimen:
    q, out = (untouched(TOKENS, m.heads, m.head_dim, dtype=dtype) for _ in range(2))
    k, v = (untouched(TOKENS, m.kv_heads, m.head_dim, dtype=dtype) for _ in range(2))
    lse = untouched(TOKENS, m.heads, dtype=torch.float32)
    mask, scale = tree(window=window), m.head_dim**-0.5

    def run() -> None:
        OPS.tree_attention(q, k, v, mask, scale=scale, softcap=softcap, out=out, lse=lse)

    def cost(launches: list[Launch]) -> Cost:
        (launch,) = launches
        once = size((2 * q.numel(), dtype), (lse.numel(), torch.float32), (TOKENS, torch.int32))
        blocks, tiles = launch.blocks, _tiles(launch)
        tile = blocks["BLOCK_K"] * (size((2 * m.head_dim, dtype)) + size((2, torch.int32)))
        return Cost(
            least=once + size((2 * k.numel(), dtype), (2 * TOKENS, torch.int32)),
            moved=once + tiles * tile,
            useful=4 * m.heads * m.head_dim * visible_pairs(mask),
            done=4 * tiles * blocks["BLOCK_Q"] * blocks["BLOCK_K"] * blocks["BLOCK_D"],
        )

    return Specimen("tree_attention", _named(m, window, softcap), dtype, run, cost, matrix=True)


def _backward_cost(m: Model, dtype: torch.dtype, mask: TreeMask, launches: list[Launch]) -> Cost:
    by_name = {launch.name: launch for launch in launches}
    by_rows, by_keys = by_name["tree_attention_dq_kernel"], by_name["tree_attention_dkv_kernel"]
    rows, keys = (TOKENS * n * m.head_dim for n in (m.heads, m.kv_heads))
    statistics = size((2 * TOKENS * m.heads, torch.float32))
    least = size((4 * rows + 4 * keys, dtype), (3 * TOKENS, torch.int32)) + statistics // 2
    # dQ: do and q once; a tile of K and V for each tile of scores.
    b, tiles = by_rows.blocks, _tiles(by_rows)
    moved = size((5 * rows, dtype)) + 2 * statistics
    moved += tiles * b["BLOCK_K"] * size((2 * m.head_dim, dtype), (2, torch.int32))
    done = 6 * tiles * b["BLOCK_Q"] * b["BLOCK_K"] * b["BLOCK_D"]
    # dK, dV: K and V once for each piece; a tile of do and q, D and lse, for each tile of scores; slots and back.
    b, table = by_keys.blocks, by_keys.arguments["pieces"].long()
    used = table[table[:, 0] >= 0]
    tiles = int(((used[:, 2] - used[:, 1] + b["BLOCK_Q"] - 1) // b["BLOCK_Q"]).sum()) * m.kv_heads
    slots = int((used[:, 5] >= 0).sum()) * m.kv_heads
    moved += len(used) * m.kv_heads * b["BLOCK_K"] * size((2 * m.head_dim, dtype))
    moved += tiles * b["BLOCK_Q"] * size((2 * m.head_dim, dtype), (3, torch.float32))
    moved += 2 * slots * 2 * b["BLOCK_K"] * b["BLOCK_D"] * 4 + size((2 * keys, dtype))
    done += 8 * tiles * b["BLOCK_Q"] * b["BLOCK_K"] * b["BLOCK_D"]
    return Cost(least, moved, 10 * m.heads * m.head_dim * visible_pairs(mask), done)


def _backward(m: Model, dtype: torch.dtype, window: int | None = None, softcap: float | None = None) -> Specimen:
    q, o, do, dq = (untouched(TOKENS, m.heads, m.head_dim, dtype=dtype) for _ in range(4))
    k, v, dk, dv = (untouched(TOKENS, m.kv_heads, m.head_dim, dtype=dtype) for _ in range(4))
    lse = untouched(TOKENS, m.heads, dtype=torch.float32)
    mask, scale = tree(window=window), m.head_dim**-0.5

    def run() -> None:
        OPS.tree_attention_backward(do, q, k, v, o, lse, mask, scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv)

    return Specimen(
        "tree_attention_backward", _named(m, window, softcap), dtype, run,
        lambda launches: _backward_cost(m, dtype, mask, launches), matrix=True,
        helpers=("tree_attention_rows_kernel", "tree_attention_reduce_kernel"),
    )  # fmt: skip


DECODING, PREFIX_KEYS, OWN_KEYS = 32, 512, 512
"""Sequences that decode at once, keys of their prefix, and keys of each one's own."""


def _decode(m: Model, dtype: torch.dtype) -> Specimen:
    q, out = (untouched(DECODING, m.heads, m.head_dim, dtype=dtype) for _ in range(2))
    prefix_k, prefix_v = (untouched(PREFIX_KEYS, m.kv_heads, m.head_dim, dtype=dtype) for _ in range(2))
    own_k, own_v = (untouched(DECODING, OWN_KEYS, m.kv_heads, m.head_dim, dtype=dtype) for _ in range(2))
    lengths = torch.full((DECODING,), OWN_KEYS, dtype=torch.int32)

    def run() -> None:
        OPS.decode_attention(q, prefix_k, prefix_v, own_k, own_v, lengths, scale=m.head_dim**-0.5, out=out)

    def cost(launches: list[Launch]) -> Cost:
        blocks = launches[0].blocks
        options = launch.options("decode_attention", launches[0].arch, dtype=dtype, head_dim=m.head_dim)
        parts = workspace_size(q, prefix_k, own_k, options) * 4
        shared, private = 2 * prefix_k.numel(), 2 * own_k.numel()
        row_blocks = -(-DECODING * (m.heads // m.kv_heads) // blocks["BLOCK_Q"])
        splits = parts // (DECODING * m.heads * (m.head_dim + 2) * 4)
        tiles = row_blocks * blocks["BLOCK_Q"] * PREFIX_KEYS + DECODING * blocks["BLOCK_H"] * OWN_KEYS
        return Cost(
            least=size((2 * q.numel() + shared + private, dtype), (DECODING, torch.int32)),
            moved=size((row_blocks * shared + private + (splits + 1) * q.numel(), dtype)) + 2 * parts,
            useful=4 * q.numel() * (PREFIX_KEYS + OWN_KEYS),
            done=4 * tiles * m.kv_heads * blocks["BLOCK_D"],
        )

    return Specimen("decode_attention", m.name, dtype, run, cost, matrix=True, helpers=("decode_merge_kernel",))


def specimens() -> list[Specimen]:
    """Every attention kernel at both models' sizes and at other head dimensions, in each type."""
    cases = (*CASES, *((m, dtype) for m in OTHERS for dtype in (torch.bfloat16, torch.float32)))
    plain = [maker(m, dtype) for maker in (_forward, _backward, _decode) for m, dtype in cases]
    capped = (QWEN_1_5B, OTHERS[-1])  # Gemma 2 has the widest heads
    masked = [maker(m, torch.bfloat16, window=512, softcap=50.0) for m in capped for maker in (_forward, _backward)]
    return [*plain, *masked]


def _tree_trials(case: str, mask: TreeMask, heads: Heads, softcap: float | None = None) -> list[Trial]:
    h, g_heads, d = heads
    n, s, scale = len(mask.query_index), len(mask.key_begin), d**-0.5
    pairs = int(mask.visible().sum())

    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        queries = {name: values(g, n, h, d) for name in ("q", "do")}
        return queries | {name: values(g, s, g_heads, d) for name in ("k", "v")}

    def forward(ops: Backend, a: Tensors) -> dict[str, Tensor]:
        dtype = a["q"].dtype
        out, lse = poisoned(n, h, d, dtype=dtype), poisoned(n, h, dtype=wide(dtype))
        ops.tree_attention(a["q"], a["k"], a["v"], mask, scale=scale, softcap=softcap, out=out, lse=lse)
        return {"out": out, "lse": lse}

    def backward(ops: Backend, a: Tensors) -> dict[str, Tensor]:
        dtype, saved = a["q"].dtype, forward(reference, a)
        grads = {"dq": poisoned(n, h, d, dtype=dtype)}
        grads |= {name: poisoned(s - mask.prefix, g_heads, d, dtype=dtype) for name in ("dk", "dv")}
        ops.tree_attention_backward(
            a["do"], a["q"], a["k"], a["v"], saved["out"], saved["lse"], mask, scale=scale, softcap=softcap, **grads
        )
        return grads

    return [
        Trial("tree_attention", case, inputs, forward, useful=4 * h * d * pairs),
        Trial("tree_attention_backward", case, inputs, backward, useful=10 * h * d * pairs),
    ]


def _decode_trial(batch: int, prefix: int, own: int, heads: Heads, softcap: float | None = None) -> Trial:
    h, g_heads, d = heads

    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, own + 1, (batch,), generator=g)
        shared = {name: values(g, prefix, g_heads, d) for name in ("prefix_k", "prefix_v")}
        private = {name: values(g, batch, own, g_heads, d) for name in ("own_k", "own_v")}
        return {"q": values(g, batch, h, d), **shared, **private, "own_lengths": lengths}

    def run(ops: Backend, a: Tensors) -> dict[str, Tensor]:
        out = poisoned(batch, h, d, dtype=a["q"].dtype)
        return {"out": ops.decode_attention(**a, scale=d**-0.5, softcap=softcap, out=out)}

    case = f"B={batch} prefix {prefix} own {own} D={d}" + " softcap" * (softcap is not None)
    return Trial("decode_attention", case, inputs, run, useful=4 * batch * h * d * (prefix + own))


def trials() -> list[Trial]:
    """Trees with branches, prefix keys, GQA, a window with a softcap, a head dimension between powers of two."""
    return [
        *_tree_trials("70 tokens GQA D=64", tree(70, 20, 4), (6, 2, 64)),
        *_tree_trials("150 tokens prefix 9 D=128", tree(150, 37, 5, 9), (4, 2, 128)),
        *_tree_trials("50 tokens window 11 softcap D=80", tree(50, 13, 3, 3, 11), (2, 1, 80), 20.0),
        *_tree_trials("1 token D=32", tree(1, 1, 1), (1, 1, 32)),
        _decode_trial(3, 70, 37, (6, 2, 64)),
        _decode_trial(5, 33, 9, (2, 2, 80), softcap=20.0),
        _decode_trial(1, 1, 1, (1, 1, 32)),
    ]
