"""Cases of the attention kernels: token trees forward and backward, and answers being written."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from embedgrad.backends.base import Backend, Heads
from embedgrad.backends.launch_check.case import Case, Tensors, named, normal, poisoned, seeded, wide
from embedgrad.backends.mask import TreeMask
from embedgrad.backends.reference import OPS as reference
from embedgrad.backends.triton import OPS as kernels

FORWARD, DQ, DKV = "tree_attention_forward", "tree_attention_backward_dq", "tree_attention_backward_dkv"
SOFTCAP = 20.0
_OUTPUTS = {FORWARD: ("out", "lse"), DQ: ("dq",), DKV: ("dk", "dv")}

Tree = tuple[int, int, int]
"""Tokens of the shared prompt, tokens of each branch behind it, and branches."""


def _mask(tree: Tree, window: int | None, device: torch.device) -> TreeMask:
    shared, length, branches = tree
    tokens = shared + length * branches
    begin = torch.arange(tokens, dtype=torch.int32)
    end = torch.full((tokens,), tokens, dtype=torch.int32)
    position = torch.arange(tokens)
    for i in range(branches):
        start = shared + i * length
        end[start : start + length] = start + length
        position[start : start + length] = shared + torch.arange(length)
    positions = position if window is not None else None
    mask = TreeMask(begin, end, begin, 0, window, positions, positions)
    return mask.moved(lambda x: x.to(device))


def tree_attention(
    kernel: str, tree: Tree, heads: Heads, dtype: torch.dtype, *, extras: int = 0, warm: bool = False
) -> Case:
    """kernel: FORWARD, DQ or DKV. extras: 0, or 2 for a sliding window and a softcap."""
    shared, length, branches = tree
    h, groups, size = heads
    tokens, scale = shared + length * branches, size**-0.5
    window, softcap = (max(tokens // 3, 1), SOFTCAP) if extras else (None, None)

    @cache
    def mask(device: torch.device) -> TreeMask:
        return _mask(tree, window, device)

    def inputs(device: torch.device) -> Tensors:
        g = seeded(device)
        a = {name: normal(g, tokens, h, size, dtype=dtype) for name in ("q", "do")}
        a |= {name: normal(g, tokens, groups, size, dtype=dtype) for name in ("k", "v")}
        if kernel != FORWARD:  # what the forward pass leaves, from plain torch
            a["o"], a["lse"] = poisoned(a["q"]), poisoned(a["q"], tokens, h, dtype=wide(dtype))
            attend(reference, FORWARD, a, {"out": a["o"], "lse": a["lse"]})
        return a

    def fresh(a: Tensors) -> Tensors:
        like = {"out": a["q"], "dq": a["q"], "dk": a["k"], "dv": a["v"]}
        return {
            name: poisoned(like[name]) if name in like else poisoned(a["q"], tokens, h, dtype=wide(a["q"].dtype))
            for name in _OUTPUTS[kernel]
        }

    def attend(ops: Backend, what: str, a: Tensors, out: Tensors) -> None:
        q, k, v, of = a["q"], a["k"], a["v"], mask(a["q"].device)
        if what == FORWARD:
            ops.tree_attention(q, k, v, of, scale=scale, softcap=softcap, out=out["out"], lse=out["lse"])
        else:
            wanted = {name: out.get(name) for name in ("dq", "dk", "dv")}
            ops.tree_attention_backward(a["do"], q, k, v, a["o"], a["lse"], of, scale=scale, softcap=softcap, **wanted)

    def by(ops: Backend) -> Callable[[Tensors, Tensors], None]:
        return lambda a, out: attend(ops, kernel, a, out)

    text = f"{shared}/{length}/{branches}, {h}/{groups} heads of {size}" + " with window and softcap" * (extras > 0)
    sizes = {"head_dim": size, "extras": extras}
    return Case(kernel, f"{text} {named(dtype)}", dtype, sizes, inputs, fresh, by(kernels), by(reference), warm)


def decode_attention(sequences: int, prefix: int, own: int, heads: Heads, dtype: torch.dtype) -> Case:
    """One new token of each of `sequences`, behind `prefix` shared keys and up to `own` of each."""
    h, groups, size = heads

    def inputs(device: torch.device) -> Tensors:
        g = seeded(device)
        a = {name: normal(g, prefix, groups, size, dtype=dtype) for name in ("prefix_k", "prefix_v")}
        a |= {name: normal(g, sequences, own, groups, size, dtype=dtype) for name in ("own_k", "own_v")}
        lengths = own - torch.arange(sequences, device=device) % max(own // 2, 1)
        return {**a, "q": normal(g, sequences, h, size, dtype=dtype), "own_lengths": lengths.int()}

    def fresh(a: Tensors) -> Tensors:
        return {"out": poisoned(a["q"])}

    def by(ops: Backend) -> Callable[[Tensors, Tensors], None]:
        def run(a: Tensors, out: Tensors) -> None:
            ops.decode_attention(
                a["q"], a["prefix_k"], a["prefix_v"], a["own_k"], a["own_v"], a["own_lengths"],
                scale=size**-0.5, out=out["out"],
            )  # fmt: skip

        return run

    text = f"{sequences} x ({prefix} + {own}), {h}/{groups} heads of {size} {named(dtype)}"
    return Case("decode_attention", text, dtype, {"head_dim": size}, inputs, fresh, by(kernels), by(reference))
