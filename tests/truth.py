"""What results are held against: transformers autograd, and a dense float64 forward of our own under autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from embedgrad.compare.twin import transformers_twin
from embedgrad.engine.model import Model
from embedgrad.prompt.rendering import Rendered

__all__ = ["dense_loss", "relative_error", "transformers_loss_and_grad", "transformers_twin"]


def transformers_loss_and_grad(
    twin: torch.nn.Module, embeddings: Tensor, sequences: Sequence[Rendered], weights: Sequence[float] | None = None
) -> tuple[float, Tensor]:
    """Loss and gradient by autograd through transformers, one whole sequence at a time."""
    e = embeddings.clone().requires_grad_(True)
    table = twin.get_input_embeddings().weight.detach()
    weights = [1.0] * len(sequences) if weights is None else weights
    total = sum(weights)
    loss = 0.0
    for sequence, weight in zip(sequences, weights, strict=True):
        x = _embed(sequence, e, table)
        logits = twin(inputs_embeds=x[None], use_cache=False).logits[0]
        part = _mean_nll(logits, sequence) * (weight / total)
        part.backward()
        loss += float(part.detach())
    assert e.grad is not None
    return loss, e.grad


def _embed(sequence: Rendered, e: Tensor, table: Tensor) -> Tensor:
    rows = torch.tensor(sequence.prompt_rows)
    x = table[torch.tensor(sequence.ids)]
    return torch.where((rows >= 0)[:, None], e[rows.clamp_min(0)], x)


def _mean_nll(logits: Tensor, sequence: Rendered) -> Tensor:
    wanted = torch.tensor([t for t, is_target in enumerate(sequence.target_mask) if is_target])
    ids = torch.tensor(sequence.ids)[wanted]
    return torch.nn.functional.cross_entropy(logits[wanted - 1], ids)


def dense_loss(model: Model, e: Tensor, sequences: Sequence[Rendered]) -> Tensor:
    """The loss by a plain dense forward, written from the equations, in `e`'s type; differentiable."""
    losses = [_mean_nll(_dense_logits(model, _embed(s, e, model.weights.embedding.to(e.dtype))), s) for s in sequences]
    return torch.stack(losses).mean()


def _dense_logits(model: Model, x: Tensor) -> Tensor:
    c, wide = model.config, x.dtype
    h, g, size = c.num_heads, c.num_kv_heads, c.head_dim
    n = len(x)
    assert c.rope.kind == "default"
    frequency = c.rope.theta ** (-torch.arange(0, size, 2, dtype=wide) / size)
    angle = torch.arange(n, dtype=wide)[:, None] * frequency
    cos, sin = (torch.cat([f, f], dim=-1)[:, None] for f in (angle.cos(), angle.sin()))

    def norm(y: Tensor, w: Tensor) -> Tensor:
        return y / torch.sqrt(y.square().mean(-1, keepdim=True) + c.rms_eps) * w.to(wide)

    def linear(y: Tensor, m) -> Tensor:
        out = y @ torch.cat([p.to(wide) for p in m.parts]).T
        return out if m.bias is None else out + m.bias.to(wide)

    def rotate(y: Tensor) -> Tensor:
        first, second = y.chunk(2, dim=-1)
        return y * cos + torch.cat([-second, first], dim=-1) * sin

    i = torch.arange(n)
    for layer, window in zip(model.weights.layers, c.windows, strict=True):
        q, k, v = linear(norm(x, layer.attention_norm), layer.qkv).split((h * size, g * size, g * size), dim=-1)
        q, k, v = q.view(n, h, size), k.view(n, g, size), v.view(n, g, size)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        q, k = rotate(q), rotate(k).repeat_interleave(h // g, 1)
        seen = i[:, None] >= i
        if window is not None:
            seen &= i[:, None] - i < window
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(size)
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        o = torch.einsum("hij,jhd->ihd", p, v.repeat_interleave(h // g, 1)).reshape(n, -1)
        x = x + linear(o, layer.out)
        gate, up = linear(norm(x, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
        x = x + linear(torch.nn.functional.silu(gate) * up, layer.down)
    return linear(norm(x, model.weights.final_norm), model.weights.head)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖; 0 where both are 0 (a prompt that a sliding window hides)."""
    difference = float((value.double() - truth.double()).norm())
    return difference and difference / float(truth.double().norm())
