"""The reference backend: every operation in plain torch, for any float type and any device torch has.

It is `naive` made fast enough to use: sums and softmax run in float32 for 16-bit inputs and in the input's own type
otherwise, elementwise work goes by blocks of rows that stay in the cache, attention by blocks of queries with the keys
that any of them sees, and the logits exist some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from embedgrad.backends.base import Backend, Head, Heads
from embedgrad.backends.mask import TreeMask

BLOCK = 1 << 18  # numbers per block of elementwise work: a few arrays of this size stay in the cache
QUERY_BLOCK = 128  # query rows whose attention is computed together
LOGIT_BYTES = 32 << 20  # largest piece of the logit matrix that exists at once


class Reference(Backend):
    """See the module."""

    name = "reference"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> Tensor:
        for rows in _row_blocks(x):
            wide = _wide(x[rows])
            torch.mul((wide * _inverse_rms(wide, eps)).to(weight.dtype), weight, out=out[rows])
        return out

    def rms_norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, eps: float, *, dx: Tensor) -> Tensor:
        wide_weight = _wide(weight)
        for rows in _row_blocks(x):
            wide = _wide(x[rows])
            r = _inverse_rms(wide, eps)
            wdy = _wide(dy[rows]) * wide_weight
            along = torch.bmm(wdy.unsqueeze(1), wide.unsqueeze(2)).squeeze(2).div_(x.shape[1]).mul_(r.pow(3))
            if wdy.dtype == dx.dtype:
                dx[rows].addcmul_(wdy, r).addcmul_(wide, along, value=-1)
            else:
                dx[rows] += wdy.mul_(r).addcmul_(wide, along, value=-1)
        return dx

    def rope(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: Heads,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        for rows in _row_blocks(qkv):
            block_cos, block_sin = cos[rows, None], sin[rows, None]
            for part, weight in zip(_split_heads(qkv[rows], heads), (q_norm, k_norm), strict=True):
                if weight is not None:
                    wide = _wide(part)
                    part.copy_((wide * _inverse_rms(wide, eps)).to(weight.dtype) * weight)
                _rotate(part, block_cos, block_sin)
        return qkv

    def rope_backward(
        self,
        dqkv: Tensor,
        qkv_raw: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        heads: Heads,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        for rows in _row_blocks(dqkv):
            block_cos, block_sin = cos[rows, None], sin[rows, None]
            raw = (None, None) if qkv_raw is None else _split_heads(qkv_raw[rows], heads)
            for part, x, weight in zip(_split_heads(dqkv[rows], heads), raw, (q_norm, k_norm), strict=True):
                _rotate(part, block_cos, -block_sin)
                if weight is not None:
                    assert x is not None
                    wide = _wide(x)
                    r = _inverse_rms(wide, eps)
                    wdy = _wide(part) * _wide(weight)
                    mean = (wdy * wide).sum(-1, keepdim=True).mul_(r).div_(wide.shape[-1])
                    part.copy_(wdy.addcmul_(wide * r, mean, value=-1).mul_(r))
        return dqkv

    def swiglu(self, gate_up: Tensor, *, out: Tensor, gelu: bool = False) -> Tensor:
        for rows in _row_blocks(gate_up):
            gate, up = gate_up[rows].chunk(2, dim=1)
            torch.mul(_activated(gate, gelu), up, out=out[rows])
        return out

    def swiglu_backward(self, da: Tensor, gate_up: Tensor, *, out: Tensor, gelu: bool = False) -> Tensor:
        for rows in _row_blocks(gate_up):
            gate, up = gate_up[rows].chunk(2, dim=1)
            d_gate, d_up = out[rows].chunk(2, dim=1)
            d_active = da[rows] * up
            torch.mul(da[rows], _activated(gate, gelu), out=d_up)
            if gelu:
                torch.ops.aten.gelu_backward.grad_input(d_active, gate, approximate="tanh", grad_input=d_gate)
            else:
                torch.ops.aten.silu_backward.grad_input(d_active, gate, grad_input=d_gate)
        return out

    def tree_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: TreeMask,
        *,
        scale: float,
        softcap: float | None = None,
        out: Tensor,
        lse: Tensor,
        workspace: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        groups = k.shape[1]
        for block in blocks(mask):
            n = len(q[block.queries])
            block_k, block_v = (_wide(x[block.keys]).transpose(0, 1) for x in (k, v))
            p, _ = _scores(_grouped(_wide(q[block.queries]), groups), block_k, block, scale, softcap)
            if block.num_keys == 0:
                out[block.queries], lse[block.queries] = 0, float("-inf")
                continue
            highest = p.amax(-1, keepdim=True)
            highest.masked_fill_(highest == float("-inf"), 0)
            p.sub_(highest).exp_()
            total = p.sum(-1, keepdim=True)
            lse[block.queries] = _ungrouped(highest + total.log(), n).squeeze(2)
            total.masked_fill_(total == 0, 1)
            out[block.queries] = _ungrouped(torch.matmul(p.to(v.dtype).to(block_v.dtype), block_v).div_(total), n)
        return out, lse

    def tree_attention_backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        mask: TreeMask,
        *,
        scale: float,
        softcap: float | None = None,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> None:
        groups = k.shape[1]
        sums = {}
        for name, given in (("dk", dk), ("dv", dv)):
            if given is not None:
                sums[name] = torch.zeros(k.shape[1], k.shape[0], k.shape[2], dtype=_wide(k[:0]).dtype, device=k.device)
        for block in blocks(mask):
            queries, keys = block.queries, block.keys
            if block.num_keys == 0:
                if dq is not None:
                    dq[queries] = 0
                continue
            n = len(q[queries])
            block_q, block_do = (_grouped(_wide(x[queries]), groups) for x in (q, do))
            block_k, block_v = (_wide(x[keys]).transpose(0, 1) for x in (k, v))
            normaliser = _grouped_rows(lse[queries], groups)
            normaliser = normaliser.masked_fill(normaliser == float("-inf"), 0)
            p, slope = _scores(block_q, block_k, block, scale, softcap, minus=normaliser)
            p.exp_()
            if "dv" in sums:
                _accumulate(sums["dv"], keys, torch.matmul(p.transpose(1, 2), block_do))
            if dq is None and dk is None:
                continue
            delta = (block_do * _grouped(_wide(o[queries]), groups)).sum(-1, keepdim=True)
            ds = torch.baddbmm((-delta).expand_as(p), block_do, block_v.transpose(1, 2)).mul_(p)
            if slope is not None:
                ds.mul_(slope)
            if dq is not None:
                dq[queries] = _ungrouped(torch.matmul(ds, block_k).mul_(scale), n)
            if "dk" in sums:
                _accumulate(sums["dk"], keys, torch.matmul(ds.transpose(1, 2), block_q).mul_(scale))
        for name, given in (("dk", dk), ("dv", dv)):
            if given is not None:
                given.copy_(sums[name][:, mask.prefix :].transpose(0, 1))

    def decode_attention(
        self,
        q: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        own_k: Tensor,
        own_v: Tensor,
        own_lengths: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        first_seen: Tensor | None = None,
        out: Tensor,
    ) -> Tensor:
        batch, h, size = q.shape
        groups, prefix = prefix_k.shape[1], len(prefix_k)
        longest = int(own_lengths.max()) if batch else 0
        own_k, own_v = own_k[:, :longest], own_v[:, :longest]
        past = torch.arange(longest, device=q.device) >= own_lengths[:, None]
        grouped = _wide(q).reshape(batch, groups, h // groups, size)
        shared = torch.einsum("bgrd,sgd->bgrs", grouped, _wide(prefix_k))
        own = torch.einsum("bgrd,bcgd->bgrc", grouped, _wide(own_k))
        scores = torch.cat([shared, own], dim=-1).mul_(scale)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores[..., prefix:].masked_fill_(past[:, None, None], float("-inf"))
        if first_seen is not None:
            gone = torch.arange(prefix + longest, device=q.device) < first_seen[:, None]
            scores.masked_fill_(gone[:, None, None], float("-inf"))
        highest = scores.amax(-1, keepdim=True)
        p = scores.sub_(highest.masked_fill_(highest == float("-inf"), 0)).exp_()
        total = p.sum(-1, keepdim=True)
        p = p.div_(total.masked_fill_(total == 0, 1)).to(q.dtype).to(grouped.dtype)
        o = torch.einsum("bgrs,sgd->bgrd", p[..., :prefix], _wide(prefix_v))
        o += torch.einsum("bgrc,bcgd->bgrd", p[..., prefix:], _wide(own_v).masked_fill(past[..., None, None], 0))
        return out.copy_(o.reshape(batch, h, size))

    def embed(self, rows: Tensor, table: Tensor, ids: Tensor, prompt_rows: Tensor, *, out: Tensor) -> Tensor:
        out.copy_(table[ids])
        shown = (prompt_rows >= 0).nonzero().squeeze(1)
        out[shown] = rows[prompt_rows[shown]].to(out.dtype)
        return out

    def embed_backward(self, dx: Tensor, prompt_rows: Tensor, *, grad: Tensor) -> Tensor:
        grad.zero_()
        shown = (prompt_rows >= 0).nonzero().squeeze(1)
        return grad.index_add_(0, prompt_rows[shown], dx[shown].to(grad.dtype))

    def linear_cross_entropy_bytes(self, count: int, vocabulary: int, dtype: torch.dtype) -> int:
        return _logit_rows(count, vocabulary, dtype, None) * vocabulary * dtype.itemsize

    def linear_cross_entropy(
        self,
        h: Tensor,
        head: Head,
        targets: Tensor,
        weights: Tensor,
        *,
        softcap: float | None = None,
        dh: Tensor | None = None,
        logit_bytes: int | None = None,
        workspace: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        vocabulary = head.shape[0]
        wide = _wide(h[:0]).dtype
        nll = torch.zeros(len(h), dtype=wide, device=h.device)
        predicted = torch.empty(len(h), dtype=torch.int64, device=h.device)
        step = _logit_rows(len(h), vocabulary, h.dtype, logit_bytes)
        if workspace is None:
            buffer = torch.empty(step, vocabulary, dtype=h.dtype, device=h.device)
        else:
            buffer = workspace[: step * vocabulary * h.dtype.itemsize].view(h.dtype).view(step, vocabulary)
        for start in range(0, len(h), max(1, step)):
            rows = slice(start, min(start + step, len(h)))
            z = _wide(head.forward(h[rows], out=buffer[: rows.stop - start]))
            slope = None
            if softcap is not None:
                capped = torch.tanh(z / softcap)
                slope, z = 1 - capped.square(), capped * softcap
            counted = targets[rows] >= 0
            at = targets[rows].clamp_min(0).unsqueeze(1)
            predicted[rows] = z.argmax(dim=1)
            # torch's own log-softmax, whose float32 sum over a large vocabulary is off by some 1e-5: whoever holds our
            # gradient against autograd through torch then finds the same rounding on both sides.
            z = torch.log_softmax(z, dim=1)
            nll[rows] = torch.where(counted, -z.gather(1, at).squeeze(1), 0)
            if dh is None:
                continue
            weight = torch.where(counted, weights[rows], 0).to(wide).unsqueeze(1)
            z.exp_().mul_(weight).scatter_add_(1, at, -weight)
            if slope is not None:
                z.mul_(slope)
            head.backward(z.to(h.dtype), out=dh[rows])
        return nll, predicted


OPS = Reference()


@dataclass(frozen=True)
class Block:
    """`queries` (a slice of query rows) see at most `keys`; `hidden` [queries, keys] marks those they do not see."""

    queries: slice
    keys: slice | Tensor
    num_keys: int
    hidden: Tensor | None
    _bias: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to scores: 0, or −inf where hidden; [queries, keys], None where all is visible."""
        if self.hidden is None:
            return None
        if dtype not in self._bias:
            zero = torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device)
            self._bias[dtype] = zero.masked_fill_(self.hidden, float("-inf"))
        return self._bias[dtype]


def blocks(mask: TreeMask, size: int = QUERY_BLOCK) -> list[Block]:
    """Blocks of at most `size` queries with the keys that any of them sees; made once, used by every layer.

    A block ends where a subtree ends, if that makes it a quarter of `size` or more: then it sees no other branch.
    """
    return mask.cached(("reference", size), lambda: [_block(mask, queries) for queries in mask.query_slices(size)])


def _block(mask: TreeMask, queries: slice) -> Block:
    index = mask.query_index[queries]
    reachable = (mask.key_begin <= index[-1]) & (mask.key_end > index[0])
    found = reachable.nonzero().squeeze(1)
    keys: slice | Tensor = found
    if len(found) and int(found[-1]) - int(found[0]) + 1 == len(found):
        keys = slice(int(found[0]), int(found[-1]) + 1)
    hidden = ~mask.visible_part(queries, keys)
    return Block(queries, keys, len(found), hidden if bool(hidden.any()) else None)


def _wide(x: Tensor) -> Tensor:
    """`x` in the type that sums are computed in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _row_blocks(x: Tensor) -> Iterator[slice]:
    rows = max(16, BLOCK // max(1, x.shape[1]))
    for start in range(0, len(x), rows):
        yield slice(start, min(start + rows, len(x)))


def _activated(gate: Tensor, gelu: bool) -> Tensor:
    return torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """r = rsqrt(mean(x²) + eps), shape [..., 1]; x is wide."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """(x₁, x₂) ← (x₁cos − x₂sin, x₂cos + x₁sin) on the halves of the last dimension, in place; cos, sin [T, 1, D/2]."""
    first, second = x.chunk(2, dim=-1)
    before = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(before, sin)


def _split_heads(qkv: Tensor, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    h, g, size = heads
    q = qkv[:, : h * size].unflatten(1, (h, size))
    return q, qkv[:, h * size : (h + g) * size].unflatten(1, (g, size))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[n, H, D] as [G, (H/G)·n, D]: the query heads of one key/value head stand together."""
    n, h, size = x.shape
    return x.view(n, groups, h // groups, size).permute(1, 2, 0, 3).reshape(groups, -1, size)


def _ungrouped(x: Tensor, n: int) -> Tensor:
    """The inverse of `_grouped`: [G, (H/G)·n, D] as [n, H, D]."""
    groups, _, size = x.shape
    return x.view(groups, -1, n, size).permute(2, 0, 1, 3).reshape(n, -1, size)


def _grouped_rows(x: Tensor, groups: int) -> Tensor:
    """[n, H] as [G, (H/G)·n, 1]."""
    return _grouped(x.unsqueeze(2), groups)


def _scores(
    q: Tensor, k: Tensor, block: Block, scale: float, softcap: float | None, minus: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scores [G, (H/G)·n, S'] less `minus` [G, (H/G)·n, 1], −inf where hidden; and the softcap's derivative."""
    groups, rows = q.shape[:2]
    bias = block.bias(q.dtype)
    if softcap is not None:
        capped = torch.tanh(torch.matmul(q, k.transpose(1, 2)).mul_(scale / softcap))
        slope = 1 - capped.square()
        scores = capped.mul_(softcap)
        if bias is not None:
            scores.view(groups, -1, *bias.shape).add_(bias)
        return (scores if minus is None else scores.sub_(minus)), slope
    if bias is None:
        start = torch.zeros((), dtype=q.dtype, device=q.device) if minus is None else -minus
        return torch.baddbmm(start.expand(groups, rows, block.num_keys), q, k.transpose(1, 2), alpha=scale), None
    scores = torch.empty(groups, rows, block.num_keys, dtype=q.dtype, device=q.device)
    split = scores.view(groups, -1, *bias.shape)
    if minus is None:
        split.copy_(bias)
    else:
        torch.sub(bias, minus.view(groups, -1, len(bias), 1), out=split)
    return scores.baddbmm_(q, k.transpose(1, 2), alpha=scale), None


def _accumulate(total: Tensor, keys: slice | Tensor, part: Tensor) -> None:
    if isinstance(keys, slice):
        total[:, keys] += part
    else:
        total.index_add_(1, keys, part)


def _logit_rows(count: int, vocabulary: int, dtype: torch.dtype, logit_bytes: int | None) -> int:
    limit = LOGIT_BYTES if logit_bytes is None else logit_bytes
    return min(count, max(1, limit // (vocabulary * dtype.itemsize)))
