"""The reference backend: every operation in plain torch, for any float type and any device torch has.

It is what every other backend is tested against. Products, sums of squares and softmax run in float32 for 16-bit
inputs and in the input's own type otherwise. Elementwise work goes by blocks of rows that stay in the cache. Shapes:
T tokens, d width, H query heads over G key/value heads of size D, F feed-forward width, S keys, V vocabulary.

`*_bytes` say how much memory an op takes from its `workspace` (uint8, on the op's device); without one it allocates
that itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from embedgrad.optimizer import prompt_step
from embedgrad.tree import Block, TreeMask

__all__ = [
    "NAME", "add_rms_norm", "decode_attention", "embed", "embed_backward", "linear_cross_entropy",
    "linear_cross_entropy_bytes", "prompt_step", "rms_norm", "rms_norm_backward", "rope", "rope_backward", "swiglu",
    "swiglu_backward", "tree_attention", "tree_attention_backward", "tree_attention_backward_bytes",
    "tree_attention_bytes",
]  # fmt: skip

NAME = "reference"
BLOCK = 1 << 18  # numbers per block of elementwise work: a few arrays of this size stay in the cache
LOGIT_BYTES = 32 << 20  # largest piece of the logit matrix that exists at once


class Head(Protocol):
    """The frozen matrix [V, d] in front of the softmax."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def forward(self, x: Tensor, out: Tensor) -> Tensor: ...
    def backward(self, dy: Tensor, out: Tensor) -> Tensor: ...


def _wide(x: Tensor) -> Tensor:
    """`x` in the type that sums are computed in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _row_blocks(x: Tensor) -> Iterator[slice]:
    rows = max(16, BLOCK // max(1, x.shape[1]))
    for start in range(0, len(x), rows):
        yield slice(start, min(start + rows, len(x)))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """r = rsqrt(mean(x²) + eps), shape [..., 1]; x is wide."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> Tensor:
    """out = x̂ ⊙ w with x̂ = x·r, r = rsqrt(mean(x²) + eps); x, out [T, d], weight [d].

    x̂ is rounded to x's type before the product with the weight, as transformers does.
    """
    for rows in _row_blocks(x):
        wide = _wide(x[rows])
        torch.mul((wide * _inverse_rms(wide, eps)).to(x.dtype), weight, out=out[rows])
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> Tensor:
    """x += residual in place, then `rms_norm`."""
    x.add_(residual)
    return rms_norm(x, weight, eps, out=out)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, *, dx: Tensor) -> Tensor:
    """dx += r (w ⊙ dy − x̂ · mean(x̂ ⊙ w ⊙ dy)); all [T, d] but weight [d]."""
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


def rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int, int],
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotate q and k inside the fused buffer, in place; per-head RMS norm first where its weights are given.

    qkv [T, (H + 2G)·D], cos and sin [T, D/2], heads = (H, G, D), q_norm and k_norm [D].
    """
    for rows in _row_blocks(qkv):
        block_cos, block_sin = cos[rows, None], sin[rows, None]
        for part, weight in zip(_split_heads(qkv[rows], heads), (q_norm, k_norm), strict=True):
            if weight is not None:
                wide = _wide(part)
                part.copy_((wide * _inverse_rms(wide, eps)).to(part.dtype) * weight)
            _rotate(part, block_cos, block_sin)
    return qkv


def rope_backward(
    dqkv: Tensor,
    qkv_raw: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int, int],
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The transpose of `rope`, in place on dqkv [T, (H + 2G)·D]: inverse rotation, then the norm's backward.

    qkv_raw [T, ≥ (H + G)·D] holds the projections before norm and rotation; read only with qk-norm.
    """
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


def swiglu(gate_up: Tensor, *, out: Tensor) -> Tensor:
    """out = g σ(g) ⊙ u; gate_up = [g, u] [T, 2F], out [T, F]."""
    for rows in _row_blocks(gate_up):
        gate, up = gate_up[rows].chunk(2, dim=1)
        torch.mul(torch.nn.functional.silu(gate), up, out=out[rows])
    return out


def swiglu_backward(da: Tensor, gate_up: Tensor, *, out: Tensor) -> Tensor:
    """dg = da ⊙ u ⊙ σ(g)(1 + g(1 − σ(g))), du = da ⊙ g σ(g); out [T, 2F] may be gate_up itself."""
    for rows in _row_blocks(gate_up):
        gate, up = gate_up[rows].chunk(2, dim=1)
        d_gate, d_up = out[rows].chunk(2, dim=1)
        d_silu = da[rows] * up
        torch.mul(da[rows], torch.nn.functional.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_silu, gate, grad_input=d_gate)
    return out


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


def tree_attention_bytes(queries: int, keys: int, heads: tuple[int, int, int]) -> int:
    """None: what torch's operations take on the way is theirs."""
    return 0


def tree_attention_backward_bytes(
    queries: int, keys: int, heads: tuple[int, int, int], *, dq: bool = True, dkv: bool = True
) -> int:
    """None, likewise."""
    return 0


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


def tree_attention(
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
    """o = softmax(scale·q kᵀ + mask) v and the natural-log normaliser lse; GQA.

    q, out [Nq, H, D]; k, v [S, G, D]; lse [Nq, H]. A query that sees no key gives o = 0, lse = −inf.
    """
    groups = k.shape[1]
    for block in mask.blocks():
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
    """P = exp(scale·q kᵀ − lse), dV = Pᵀ do, dS = P ⊙ (do Vᵀ − D), dq = scale·dS k, dk = scale·dSᵀ q, D = Σ do ⊙ o.

    do, o, dq [Nq, H, D]; dk, dv [S − mask.kept, G, D] for the tree's own keys, summed over the group's query heads.
    What is None is not computed; what is given is overwritten.
    """
    groups = k.shape[1]
    sums = {}
    for name, given in (("dk", dk), ("dv", dv)):
        if given is not None:
            sums[name] = torch.zeros(k.shape[1], k.shape[0], k.shape[2], dtype=_wide(k[:0]).dtype, device=k.device)
    for block in mask.blocks():
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
            given.copy_(sums[name][:, mask.kept :].transpose(0, 1))


def _accumulate(total: Tensor, keys: slice | Tensor, part: Tensor) -> None:
    if isinstance(keys, slice):
        total[:, keys] += part
    else:
        total.index_add_(1, keys, part)


def _logit_rows(count: int, vocabulary: int, dtype: torch.dtype, logit_bytes: int | None) -> int:
    limit = LOGIT_BYTES if logit_bytes is None else logit_bytes
    return min(count, max(1, limit // (vocabulary * dtype.itemsize)))


def linear_cross_entropy_bytes(count: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes that `linear_cross_entropy` takes: the logits of some rows, in the type of `h`."""
    return _logit_rows(count, vocabulary, dtype, None) * vocabulary * dtype.itemsize


def linear_cross_entropy(
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
    """Negative log-likelihood [N] of `targets` under softmax(h Wᵀ), and the arg-max token [N].

    h [N, d], targets [N] int64 (−1: ignored, nll 0), weights [N]. Where `dh` [N, d] is given it becomes
    Σ weights·dnll/dh. The logits exist `logit_bytes` at a time (default `LOGIT_BYTES`), some rows whole.
    """
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


def embed(rows: Tensor, table: Tensor, ids: Tensor, prompt_rows: Tensor, *, out: Tensor) -> Tensor:
    """out[i] = rows[prompt_rows[i]] where a prompt row is shown, else table[ids[i]]; rows [k, d], table [V, d]."""
    out.copy_(table[ids])
    shown = (prompt_rows >= 0).nonzero().squeeze(1)
    out[shown] = rows[prompt_rows[shown]].to(out.dtype)
    return out


def embed_backward(dx: Tensor, prompt_rows: Tensor, *, grad: Tensor) -> Tensor:
    """grad[r] = Σ of dx[i] over the positions i that show row r, in order of position; dx [P, d], grad [k, d]."""
    grad.zero_()
    shown = (prompt_rows >= 0).nonzero().squeeze(1)
    return grad.index_add_(0, prompt_rows[shown], dx[shown].to(grad.dtype))


def decode_attention(
    q: Tensor,
    trunk_k: Tensor,
    trunk_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    own_lengths: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    first_seen: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """One new query per sequence against the shared trunk and its own keys.

    q, out [B, H, D]; trunk_k, trunk_v [S, G, D]; own_k, own_v [B, C, G, D] of which own_lengths [B] count.
    first_seen [B]: with a sliding window, the first key that a query sees, counted through trunk and own keys. A query
    without any key gives 0.
    """
    batch, h, size = q.shape
    groups, trunk = trunk_k.shape[1], len(trunk_k)
    longest = int(own_lengths.max()) if batch else 0
    own_k, own_v = own_k[:, :longest], own_v[:, :longest]
    past = torch.arange(longest, device=q.device) >= own_lengths[:, None]
    grouped = _wide(q).reshape(batch, groups, h // groups, size)
    shared = torch.einsum("bgrd,sgd->bgrs", grouped, _wide(trunk_k))
    own = torch.einsum("bgrd,bcgd->bgrc", grouped, _wide(own_k))
    scores = torch.cat([shared, own], dim=-1).mul_(scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores[..., trunk:].masked_fill_(past[:, None, None], float("-inf"))
    if first_seen is not None:
        gone = torch.arange(trunk + longest, device=q.device) < first_seen[:, None]
        scores.masked_fill_(gone[:, None, None], float("-inf"))
    highest = scores.amax(-1, keepdim=True)
    p = scores.sub_(highest.masked_fill_(highest == float("-inf"), 0)).exp_()
    total = p.sum(-1, keepdim=True)
    p = p.div_(total.masked_fill_(total == 0, 1)).to(q.dtype).to(grouped.dtype)
    o = torch.einsum("bgrs,sgd->bgrd", p[..., :trunk], _wide(trunk_v))
    o += torch.einsum("bgrc,bcgd->bgrd", p[..., trunk:], _wide(own_v).masked_fill(past[..., None, None], 0))
    return out.copy_(o.reshape(batch, h, size))
