"""What results are held against: transformers autograd, and a dense float64 forward of our own under autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedgrad.compare.twin import transformers_twin
from embedgrad.engine.model import Model
from embedgrad.model.rope import rotation_table
from embedgrad.prompt.rendering import Rendered

__all__ = ["dense_loss", "relative_error", "transformers_inputs", "transformers_loss_and_grad", "transformers_twin"]


def transformers_loss_and_grad(
    twin: torch.nn.Module, embeddings: Tensor, sequences: Sequence[Rendered], weights: Sequence[float] | None = None
) -> tuple[float, Tensor]:
    """Loss and gradient by autograd through transformers, one whole sequence at a time."""
    e = embeddings.clone().requires_grad_(True)
    weights = [1.0] * len(sequences) if weights is None else weights
    total = sum(weights)
    loss = 0.0
    for sequence, weight in zip(sequences, weights, strict=True):
        x, _ = transformers_inputs(twin, e, sequence)
        logits = twin(inputs_embeds=x[None], use_cache=False).logits[0]
        part = _mean_nll(logits, sequence) * (weight / total)
        part.backward()
        loss += float(part.detach())
    assert e.grad is not None
    return loss, e.grad


def transformers_inputs(twin: torch.nn.Module, e: Tensor, sequence: Rendered) -> tuple[Tensor, Tensor]:
    """What `inputs_embeds` takes for a sequence, [T, d], and for each token, [V, d].

    Gemma's embedding module scales its rows, so that these are scaled embeddings.
    """
    module = twin.get_input_embeddings()
    table, scale = module.weight.detach(), float(getattr(module, "scalar_embed_scale", 1.0))
    return _embed(sequence, e, table) * scale, table * scale


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
    n, i = len(x), torch.arange(len(x))

    def norm(y: Tensor, w: Tensor | None) -> Tensor:
        return y if w is None else y / torch.sqrt(y.square().mean(-1, keepdim=True) + c.rms_eps) * w.to(wide)

    def linear(y: Tensor, m) -> Tensor:
        out = y @ torch.cat([p.to(wide) for p in m.parts]).T
        return out if m.bias is None else out + m.bias.to(wide)

    def capped(y: Tensor, cap: float | None) -> Tensor:
        return y if cap is None else cap * torch.tanh(y / cap)

    def gate(y: Tensor) -> Tensor:
        f = torch.nn.functional
        return f.silu(y) if c.kind.gate == "silu" else f.gelu(y, approximate="tanh")

    ropes, chosen = c.ropes
    x = x * c.embedding_scale_in(wide)
    for layer, window, rope in zip(model.weights.layers, c.windows, (ropes[j] for j in chosen), strict=True):
        cos, sin = (torch.cat([f, f], dim=-1)[:, None] for f in rotation_table(rope, size, i, wide))

        def rotate(y: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            first, second = y.chunk(2, dim=-1)
            return y * cos + torch.cat([-second, first], dim=-1) * sin

        q, k, v = linear(norm(x, layer.attention_norm), layer.qkv).split((h * size, g * size, g * size), dim=-1)
        if c.kind.wide_qk_norm:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        q, k, v = q.view(n, h, size), k.view(n, g, size), v.view(n, g, size)
        if not c.kind.wide_qk_norm:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        q, k = rotate(q), rotate(k).repeat_interleave(h // g, 1)
        seen = i[:, None] >= i
        if window is not None:
            seen &= i[:, None] - i < window
        scores = capped(torch.einsum("ihd,jhd->hij", q, k) * c.scale, c.attention_softcap)
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        o = torch.einsum("hij,jhd->ihd", p, v.repeat_interleave(h // g, 1)).reshape(n, -1)
        x = x + c.residual_scale * norm(linear(o, layer.out), layer.attention_post_norm)
        g_, u = linear(norm(x, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
        x = x + c.residual_scale * norm(linear(gate(g_) * u, layer.down), layer.mlp_post_norm)
    return capped(linear(norm(x, model.weights.final_norm), model.weights.head), c.logit_softcap)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖; 0 where both are 0 (a prompt that a sliding window hides)."""
    difference = float((value.double() - truth.double()).norm())
    return difference and difference / float(truth.double().norm())
