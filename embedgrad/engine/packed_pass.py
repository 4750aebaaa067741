"""One packed pass: the tree's index tensors, masks and rotations on the model's device, and its attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from embedgrad.backends.base import Backend, CacheRows
from embedgrad.backends.mask import Move, TreeMask
from embedgrad.engine.attention import Attention, Projections
from embedgrad.engine.tree import TokenTree
from embedgrad.model.config import ModelConfig
from embedgrad.model.rope import rotation_table
from embedgrad.util.host import send_together

Rotations = tuple[tuple[Tensor, Tensor], ...]
"""cos and sin [T, D/2] of each layer; layers that rotate alike share them."""


@dataclass(frozen=True)
class PassSize:
    """tokens T, tokens of the prefix, predicting rows R (None: the last layer runs at all tokens), prompt positions P
    (None: the first layer is differentiated at all tokens), targets N. in_order: each row predicts one target.
    """

    tokens: int
    prefix: int
    rows: int | None
    shown: int | None
    targets: int
    in_order: bool = False


@dataclass(frozen=True)
class Shown:
    """The tokens that show a prompt row [P], and the masks of all queries over them, and of them over all keys."""

    tokens: Tensor
    keys: Tensor  # the same tokens, counted from the first key of the prefix on
    as_keys: TreeMask
    as_queries: TreeMask

    def moved(self, move: Move) -> Shown:
        """The same with `move` of every tensor."""
        masks = self.as_keys.moved(move), self.as_queries.moved(move)
        return Shown(move(self.tokens), move(self.keys), *masks)


@dataclass(frozen=True)
class Targets:
    """N targets: slot [N] int64, the row of the last layer's output that predicts it (None: each row predicts one, in
    order); ids [N] int64; weights [N]."""

    slot: Tensor | None
    ids: Tensor
    weights: Tensor

    def moved(self, move: Move) -> Targets:
        """The same with `move` of every tensor."""
        return Targets(None if self.slot is None else move(self.slot), move(self.ids), move(self.weights))


@dataclass(frozen=True)
class PackedPass:
    """One packed pass over T tokens.

    ids, prompt_rows, positions [T] int64; turns: rotations, empty before `rotated`; masks: one a layer; prefix: keys
    and values that stand in front of the tree's own, each [L, 2, n, G, D]; rows [R] int64: the tokens at which the last
    layer's output is read (None: all); shown: None to differentiate the first layer at every token.
    """

    ids: Tensor
    prompt_rows: Tensor
    positions: Tensor
    masks: tuple[TreeMask, ...]
    prefix: tuple[Tensor, ...]
    rows: Tensor | None
    shown: Shown | None
    targets: Targets
    turns: Rotations = ()

    def moved(self, move: Move, prefix: tuple[Tensor, ...] = ()) -> PackedPass:
        """The same pass behind `prefix`, with `move` of every other tensor, in a fixed order."""
        masks: dict[int, TreeMask] = {}
        for mask in self.masks:
            if id(mask) not in masks:
                masks[id(mask)] = mask.moved(move)
        return PackedPass(
            ids=move(self.ids),
            prompt_rows=move(self.prompt_rows),
            positions=move(self.positions),
            masks=tuple(masks[id(mask)] for mask in self.masks),
            prefix=prefix,
            rows=None if self.rows is None else move(self.rows),
            shown=None if self.shown is None else self.shown.moved(move),
            targets=self.targets.moved(move),
        )

    def rotated(self, config: ModelConfig, dtype: torch.dtype) -> PackedPass:
        """The same pass with its rotations, computed where it is."""
        return replace(self, turns=rotations(config, self.positions, dtype))

    def rotation(self, index: int) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D/2] of a layer."""
        return self.turns[index]

    def tensors(self) -> list[Tensor]:
        """Every tensor but the prefix's, in the order of `moved`."""
        found: list[Tensor] = []

        def take(x: Tensor) -> Tensor:
            found.append(x)
            return x

        self.moved(take)
        return found

    @property
    def size(self) -> PassSize:
        """How large it is."""
        return PassSize(
            len(self.ids),
            self.num_prefix,
            None if self.rows is None else len(self.rows),
            None if self.shown is None else len(self.shown.tokens),
            len(self.targets.ids),
            self.targets.slot is None,
        )

    @property
    def num_prefix(self) -> int:
        """Tokens of the prefix."""
        return sum(unit.shape[2] for unit in self.prefix)

    def cache_rows(self, index: int) -> CacheRows | None:
        """Nobody keeps the keys and values."""
        return None

    def attend(self, attention: Attention, index: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> None:
        """o and lse of q [Nq, H, D] over the prefix's keys and k, v [T, G, D]."""
        ops, arena = attention.ops, attention.arena
        k, v = self._with_prefix(attention, index, k, v)
        nbytes = ops.tree_attention_bytes(len(q), len(k), attention.heads)
        with arena.frame():
            workspace = attention.workspace(nbytes)
            ops.tree_attention(
                q, k, v, self.masks[index],
                scale=attention.scale, softcap=attention.softcap, out=o, lse=lse, workspace=workspace,
            )  # fmt: skip

    def attend_backward(
        self, attention: Attention, index: int, do: Tensor, saved: Projections, o: Tensor, lse: Tensor,
        wanted: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> None:  # fmt: skip
        """dq at the queries, dk and dv at the tree's own keys; with `wanted`, only at tokens that show a prompt row.

        Those keys' gradients are summed over all queries, and those queries see all keys: two calls.
        """
        q, mask = saved[-1].queries, self.masks[index]
        k, v = self._with_prefix(attention, index, *saved[0].keys_and_values)
        if wanted is None:
            self._scores(attention, mask, do, q, k, v, o, lse, dq, dk, dv)
            return
        assert self.shown is not None
        with attention.arena.frame():
            own_k, own_v = attention.at(self.shown.keys, k), attention.at(self.shown.keys, v)
            self._scores(attention, self.shown.as_keys, do, q, own_k, own_v, o, lse, None, dk, dv)
        do, q, o, lse = (attention.at(wanted, x) for x in (do, q, o, lse))
        self._scores(attention, self.shown.as_queries, do, q, k, v, o, lse, dq, None, None)

    def _scores(
        self, attention: Attention, mask: TreeMask, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
        dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    ) -> None:  # fmt: skip
        ops = attention.ops
        nbytes = ops.tree_attention_backward_bytes(
            len(q), len(k), attention.heads, dq=dq is not None, dkv=dk is not None
        )
        with attention.arena.frame():
            workspace = attention.workspace(nbytes)
            ops.tree_attention_backward(
                do, q, k, v, o, lse, mask,
                scale=attention.scale, softcap=attention.softcap, dq=dq, dk=dk, dv=dv, workspace=workspace,
            )  # fmt: skip

    def _with_prefix(self, attention: Attention, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [S, G, D]: the prefix's in front of the tree's own."""
        if not self.prefix:
            return k, v
        whole = attention.arena.scratch(2, self.num_prefix + len(k), *k.shape[1:], dtype=k.dtype)
        start = 0
        for unit in self.prefix:
            whole[:, start : start + unit.shape[2]] = unit[index]
            start += unit.shape[2]
        whole[0, start:], whole[1, start:] = k, v
        return whole[0], whole[1]


@dataclass(frozen=True)
class PrefixPass(PackedPass):
    """A pass whose own keys and values are kept: `keep(layer)` says where those of a layer go."""

    keep: Callable[[int], CacheRows] = field(kw_only=True)

    @classmethod
    def keeping(cls, p: PackedPass, keep: Callable[[int], CacheRows] | Tensor) -> PrefixPass:
        """The pass `p`, and where its keys and values go; a tensor [L, 2, T, G, D] receives them in order."""
        into = keep
        if not isinstance(into, Tensor):
            return cls(**vars(p), keep=into)
        whole, rows = into, torch.arange(len(p.ids), device=into.device)
        return cls(**vars(p), keep=lambda index: CacheRows(whole[index, 0], whole[index, 1], rows))

    def cache_rows(self, index: int) -> CacheRows | None:
        """See `keep`."""
        return self.keep(index)


def rotations(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Rotations:
    """The rotations of tokens at `positions` [T] in `dtype`.

    Angles are in float32, or in float64 for a float64 model.
    """
    tables = rotation_tables(config, positions, dtype)
    return tuple(tables[index] for index in config.ropes[1])


def rotation_tables(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The same for each of the different rotations of `config.ropes`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = [rotation_table(rope, config.head_dim, positions, wide) for rope in config.ropes[0]]
    return [(cos.to(dtype), sin.to(dtype)) for cos, sin in found]


def host_pass(
    config: ModelConfig,
    tree: TokenTree,
    ops: Backend,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rows: Tensor | None,
    prompt_only: bool = True,
    always_windowed: bool = False,
) -> PackedPass:
    """The pass over `tree` on the CPU, without its prefix, for a model on `device`: all that can be known early.

    rows: see `PackedPass`. prompt_only: whether the first layer is differentiated at the prompt's tokens only.
    always_windowed: keep a sliding window where nothing lies outside of it.
    """
    heads = config.num_heads, config.num_kv_heads, config.head_dim
    by_window = {window: tree.mask(window, always=always_windowed) for window in set(config.windows)}
    masks = [by_window[window] for window in config.windows]
    if rows is not None:
        masks[-1] = by_window[config.windows[-1]].select_queries(rows)
    for mask in {id(mask): mask for mask in masks}.values():
        ops.plan_attention(mask, heads, dtype, device, forward=True, dq=prompt_only, dkv=prompt_only)
    shown = None
    if prompt_only:
        first, tokens = by_window[config.windows[0]], tree.prompt_positions
        keys = tokens + tree.num_prefix
        shown = Shown(tokens, keys, first.select_keys(keys), first.select_queries(tokens))
        ops.plan_attention(shown.as_keys, heads, dtype, device, dkv=True)
        ops.plan_attention(shown.as_queries, heads, dtype, device, dq=True)
    slot = tree.predicting[tree.target_slot] if rows is None else tree.target_slot
    in_order = torch.equal(slot, torch.arange(tree.num_tokens if rows is None else len(rows)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return PackedPass(
        ids=tree.ids,
        prompt_rows=tree.prompt_rows,
        positions=tree.positions,
        masks=tuple(masks),
        prefix=(),
        rows=rows,
        shown=shown,
        targets=Targets(None if in_order else slot, tree.target_ids, tree.target_weights.to(wide)),
    )


def build_pass(
    config: ModelConfig,
    tree: TokenTree,
    prefix: tuple[Tensor, ...],
    ops: Backend,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rows: Tensor | None,
    prompt_only: bool = True,
) -> PackedPass:
    """The pass over `tree` behind `prefix` on `device`; see `host_pass`."""
    p = host_pass(config, tree, ops, dtype, device, rows=rows, prompt_only=prompt_only)
    sent = iter(send_together(p.tensors(), device))
    return p.moved(lambda _: next(sent), prefix).rotated(config, dtype)


def pass_of_size(config: ModelConfig, size: PassSize, dtype: torch.dtype) -> PackedPass:
    """A pass without memory (on `meta`), to walk through the decoder with."""

    def index(n: int) -> Tensor:
        return torch.empty(n, dtype=torch.int64, device="meta")

    def floats(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    mask = cast(TreeMask, SimpleNamespace(kept=size.prefix))
    kept = floats(config.num_layers, 2, size.prefix, config.num_kv_heads, config.head_dim)
    rotation = floats(size.tokens, config.head_dim // 2), floats(size.tokens, config.head_dim // 2)
    tokens = index(size.tokens)
    return PackedPass(
        ids=tokens,
        prompt_rows=tokens,
        positions=tokens,
        masks=(mask,) * config.num_layers,
        prefix=(kept,) if size.prefix else (),
        rows=None if size.rows is None else index(size.rows),
        shown=None if size.shown is None else Shown(index(size.shown), index(size.shown), mask, mask),
        targets=Targets(None if size.in_order else index(size.targets), index(size.targets), floats(size.targets)),
        turns=(rotation,) * config.num_layers,
    )
