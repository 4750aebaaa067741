"""The contexts of queries, before their answers: what all share is computed once, what each has alone in one pass.

With weights in blocks on the native backend csrc/ multiplies them as they are stored, with the activations in bytes
(csrc/decode/linear.h); otherwise the decoder's own matrix products are used, in the compute type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedgrad.memory import StepSize, activation_bytes
from embedgrad.model.decoding import KeyValueCache
from embedgrad.model.model import Model
from embedgrad.model.native_decoder import NativeDecoder
from embedgrad.model.step import build_step
from embedgrad.prefix_cache import keys_and_values
from embedgrad.rendering import Rendered
from embedgrad.tree import pack_branches


def shared_context(model: Model, embeddings: Tensor, sequence: Rendered, length: int) -> Tensor:
    """Keys and values [L, 2, S, G, D] of the first S = `length` tokens of `sequence`; `embeddings` are the prompt's."""
    known = model.context_cache.get(embeddings, sequence, length) if length else None
    start = 0 if known is None else known.shape[2]
    if known is not None and start == length:
        return known
    ids, rows = sequence.ids[start:length], sequence.prompt_rows[start:length]
    native = _in_blocks(model)
    if native is None or not length:
        before, kept = ((), ()) if known is None else ((tuple(sequence.ids[:start]),), (known,))
        new = keys_and_values(model, ids, before, kept, embeddings, rows)
        kept_all = new if known is None else torch.cat([known, new], dim=2)
    else:
        kept_all = _native_context(model, native, _inputs(model, embeddings, ids, rows), known)
    if length:
        model.context_cache.put(embeddings, sequence, length, kept_all)
    return kept_all


def _native_context(model: Model, native: NativeDecoder, x: Tensor, known: Tensor | None) -> Tensor:
    """Keys and values of the known tokens and, behind them, of those that go in as x [n, d]."""
    config = model.config
    start = 0 if known is None else known.shape[2]
    shape = (config.num_layers, 2, 1, start + len(x), config.num_kv_heads, config.head_dim)
    nothing, own = torch.empty(*shape[:2], 0, *shape[4:]), torch.empty(shape)
    if known is not None:
        own[:, :, 0, :start] = known
    positions, none = torch.arange(start, start + len(x)), torch.empty(0, dtype=torch.int64)
    native.advance(nothing, own, torch.zeros(len(x), dtype=torch.int64), positions, x, none)
    return own[:, :, 0]


def own_contexts(
    model: Model, embeddings: Tensor, batch: Sequence[Rendered], trunk: Tensor
) -> tuple[KeyValueCache, Tensor]:
    """A cache with what each sequence has behind the trunk [L, 2, S, G, D], and the next tokens' logits [B, V]."""
    shared = trunk.shape[2]
    lengths = torch.tensor([len(s.ids) - shared for s in batch])
    cache = KeyValueCache(model, trunk, lengths)
    sequence = torch.repeat_interleave(torch.arange(len(batch)), lengths)
    at = torch.cat([torch.arange(int(n)) for n in lengths])
    native = _in_blocks(model)
    if native is not None:
        ids, rows = [i for s in batch for i in s.ids[shared:]], [r for s in batch for r in s.prompt_rows[shared:]]
        x = _inputs(model, embeddings, ids, rows)
        return cache, native.advance(cache.trunk, cache.own, sequence, shared + at, x, lengths.cumsum(0) - 1)
    tree = pack_branches(batch, shared)
    step = build_step(model.config, tree, (trunk,) if shared else (), model.dtype, model.device, rows=tree.leaves)
    size = StepSize(tree.num_tokens, shared, len(batch), None, 0)
    model.arena.begin(activation_bytes(model.config, size, model.dtype, None, model.ops))
    place = sequence.to(model.device), at.to(model.device)
    hidden = model.decoder.keys_and_values(embeddings, step, lambda layer, k, v: cache.fill(layer, k, v, *place))
    assert hidden is not None
    return cache, cache.logits(hidden)


def _in_blocks(model: Model) -> NativeDecoder | None:
    native = model.native_decoder
    return native if native is not None and native.in_blocks else None


def _inputs(model: Model, embeddings: Tensor, ids: Sequence[int], prompt_rows: Sequence[int]) -> Tensor:
    """What goes into the first layer, [T, d] float32: rows of the prompt, elsewhere of the embedding table."""
    rows = torch.tensor(prompt_rows)
    x = model.weights.embedding[torch.tensor(ids)].float()
    return torch.where((rows >= 0)[:, None], embeddings[rows.clamp_min(0)], x)
