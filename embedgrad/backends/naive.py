"""The equations of a frozen block (docs/design.md, section 4) to the letter: what every backend is held to.

Plain torch in the inputs' own float type, with the equations' symbols as names; scores and logits are whole matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from embedgrad.backends.base import Backend, Head, Heads
from embedgrad.backends.mask import TreeMask


class Naive(Backend):  # a method's contract stands in `Backend`
    name = "naive"

    def rms_norm(self, x: Tensor, w: Tensor, eps: float, *, out: Tensor) -> Tensor:
        return out.copy_(normalised(x, eps) * w)

    def rms_norm_backward(self, dy: Tensor, x: Tensor, w: Tensor, eps: float, *, dx: Tensor) -> Tensor:
        return dx.add_(rms_backward(dy, x, w, eps))

    def rope(self, qkv, cos, sin, heads: Heads, *, q_norm=None, k_norm=None, eps: float = 0.0) -> Tensor:  # type: ignore[no-untyped-def]
        for x, w in zip(split(qkv, heads)[:2], (q_norm, k_norm), strict=True):
            x.copy_(rotated(x if w is None else normalised(x, eps) * w, cos, sin))
        return qkv

    def rope_backward(self, dqkv, raw, cos, sin, heads: Heads, *, q_norm=None, k_norm=None, eps=0.0) -> Tensor:  # type: ignore[no-untyped-def]
        before = split(raw, heads) if raw is not None else (None, None)
        for dx, x, w in zip(split(dqkv, heads)[:2], before, (q_norm, k_norm), strict=False):
            dx.copy_(rotated(dx, cos, -sin))
            if w is not None and x is not None:
                dx.copy_(rms_backward(dx, x, w, eps))
        return dqkv

    def swiglu(self, gate_up: Tensor, *, out: Tensor, gelu: bool = False) -> Tensor:
        g, u = gate_up.chunk(2, dim=1)
        return out.copy_(g * gate(g, gelu)[0] * u)

    def swiglu_backward(self, da: Tensor, gate_up: Tensor, *, out: Tensor, gelu: bool = False) -> Tensor:
        g, u = gate_up.chunk(2, dim=1)
        s, ds = gate(g, gelu)
        return out.copy_(torch.cat([da * u * (s + g * ds), da * g * s], dim=1))

    def tree_attention(self, q, k, v, mask: TreeMask, *, scale, softcap=None, out, lse, workspace=None):  # type: ignore[no-untyped-def]
        s, _ = scores(q, k, mask.visible(), scale, softcap)  # [H, Nq, S]
        lse.copy_(s.logsumexp(2).T)
        P = weights_of(s, s.logsumexp(2))
        return out.copy_((P @ per_head(v, q.shape[1])).transpose(0, 1)), lse

    def tree_attention_backward(  # type: ignore[no-untyped-def]
        self, do, q, k, v, o, lse, mask: TreeMask, *, scale, softcap=None, dq=None, dk=None, dv=None, workspace=None
    ) -> None:
        s, slope = scores(q, k, mask.visible(), scale, softcap)
        P = weights_of(s, lse.to(s.dtype).T)
        k_h, v_h = (per_head(x, q.shape[1]) for x in (k, v))  # [H, S, D]
        do, o, q = (x.transpose(0, 1) for x in (do, o, q))  # [H, Nq, D]
        D = (do * o).sum(2, keepdim=True)
        dS = P * (do @ v_h.transpose(1, 2) - D) * slope
        if dq is not None:
            dq.copy_((scale * dS @ k_h).transpose(0, 1))
        if dk is not None:
            dk.copy_(summed(scale * dS.transpose(1, 2) @ q, k)[mask.prefix :])
        if dv is not None:
            dv.copy_(summed(P.transpose(1, 2) @ do, v)[mask.prefix :])

    def decode_attention(  # type: ignore[no-untyped-def]
        self, q, prefix_k, prefix_v, own_k, own_v, own_lengths, *, scale, softcap=None, first_seen=None, out
    ) -> Tensor:
        for b, length in enumerate(own_lengths.tolist()):
            keys, values = torch.cat([prefix_k, own_k[b, :length]]), torch.cat([prefix_v, own_v[b, :length]])
            first = 0 if first_seen is None else int(first_seen[b])
            seen = torch.arange(len(keys), device=q.device).unsqueeze(0) >= first
            s, _ = scores(q[b : b + 1], keys, seen, scale, softcap)
            out[b] = (weights_of(s, s.logsumexp(2)) @ per_head(values, q.shape[1])).squeeze(1)
        return out

    def embed(self, rows: Tensor, table, ids: Tensor, prompt_rows: Tensor, *, out: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        for i, row in enumerate(prompt_rows.tolist()):
            out[i] = rows[row] if row >= 0 else table[ids[i : i + 1]][0]
        return out

    def embed_backward(self, dx: Tensor, prompt_rows: Tensor, *, grad: Tensor) -> Tensor:
        prompt = prompt_rows >= 0
        return grad.zero_().index_add_(0, prompt_rows[prompt].long(), dx[prompt].to(grad.dtype))

    def linear_cross_entropy(  # type: ignore[no-untyped-def]
        self, h: Tensor, head: Head, targets, weights, *, softcap=None, dh=None, workspace=None, logit_bytes=None
    ) -> tuple[Tensor, Tensor]:
        z, slope = capped(head.forward(h, out=h.new_empty(len(h), head.shape[0])), softcap)
        counted, at = targets >= 0, targets.clamp_min(0).unsqueeze(1)
        log_p = z.log_softmax(1)
        if dh is not None:
            dz = log_p.exp().scatter_add(1, at, -torch.ones_like(at, dtype=z.dtype))  # softmax − one-hot
            head.backward(dz * slope * torch.where(counted, weights, 0).to(z.dtype).unsqueeze(1), out=dh)
        return torch.where(counted, -log_p.gather(1, at).squeeze(1), 0), z.argmax(1)


def normalised(x: Tensor, eps: float) -> Tensor:
    """x̂ = x·r with r = rsqrt(mean(x²) + ε)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def gate(g: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """s = σ(z), z = g or 2√(2/π)(g + 0.044715 g³), and ds/dg."""
    c = 2 * (2 / math.pi) ** 0.5
    z, dz = (c * (g + 0.044715 * g**3), c * (1 + 3 * 0.044715 * g.square())) if gelu else (g, 1)
    s = torch.sigmoid(z)
    return s, s * (1 - s) * dz


def rms_backward(dy: Tensor, x: Tensor, w: Tensor, eps: float) -> Tensor:
    """r (w ⊙ dy − x̂ · mean(x̂ ⊙ w ⊙ dy))."""
    r, x_hat = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), normalised(x, eps)
    return r * (w * dy - x_hat * (x_hat * w * dy).mean(-1, keepdim=True))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin) for the halves of each head's D columns."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def split(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Views of q [T, H, D] and k [T, G, D] in the fused buffer."""
    h, g, size = heads
    return qkv[:, : h * size].unflatten(1, (h, size)), qkv[:, h * size : (h + g) * size].unflatten(1, (g, size))


def per_head(x: Tensor, heads: int) -> Tensor:
    """k or v [S, G, D] as [H, S, D]: each group's key/value head once per query head."""
    return x.transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0)


def summed(x: Tensor, k: Tensor) -> Tensor:
    """[H, S, D] as [S, G, D]: summed over the query heads of each group."""
    return x.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1)


def capped(z: Tensor, c: float | None) -> tuple[Tensor, Tensor]:
    """c tanh(z/c) and its derivative; z and 1 without a cap."""
    return (z, torch.ones_like(z)) if c is None else (c * torch.tanh(z / c), 1 - torch.tanh(z / c).square())


def scores(q: Tensor, k: Tensor, seen: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """s [H, Nq, S], −∞ where a query does not see a key, and ds/d(scale·q kᵀ)."""
    s, slope = capped(scale * q.transpose(0, 1) @ per_head(k, q.shape[1]).transpose(1, 2), softcap)
    return s.masked_fill(~seen, float("-inf")), slope


def weights_of(s: Tensor, lse: Tensor) -> Tensor:
    """P = exp(s − lse) [H, Nq, S]; 0 in a row that sees no key, where both are −∞."""
    return (s - lse.unsqueeze(2)).exp().nan_to_num(0.0)


OPS = Naive()
