"""Prefill: the keys and values of the queries' inputs. The shared prefix is computed once, all suffixes in one pass.

On the native backend with weights in blocks, csrc/ multiplies the stored blocks by activations in int8
(csrc/decode/linear.h). Otherwise the decoder's matrix products are used, in the compute type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedgrad.engine.memory import activation_bytes
from embedgrad.engine.model import Model
from embedgrad.engine.native_decoder import NativeDecoder
from embedgrad.engine.packed_pass import PrefixPass, build_pass
from embedgrad.engine.prefix_cache import keys_and_values
from embedgrad.engine.tree import pack_branches
from embedgrad.generation.kv_cache import KeyValueCache
from embedgrad.prompt.rendering import Rendered


def prefill_prefix(model: Model, embeddings: Tensor, sequence: Rendered, length: int) -> Tensor:
    """Keys and values [L, 2, S, G, D] of the first S = `length` tokens of `sequence`.

    embeddings: [k, d], the prompt rows. The model keeps the last prefix; what it has in common with this one is used.
    """
    known = model.last_prefix.get(embeddings, sequence, length) if length else None
    start = 0 if known is None else known.shape[2]
    if known is not None and start == length:
        return known
    ids, rows = sequence.ids[start:length], sequence.prompt_rows[start:length]
    native = _in_blocks(model)
    if native is None or not length:
        before, prefix = ((), ()) if known is None else ((tuple(sequence.ids[:start]),), (known,))
        new = keys_and_values(model.decoder, ids, before, prefix, embeddings, rows)
        keys = new if known is None else torch.cat([known, new], dim=2)
    else:
        keys = _native_prefix(model, native, _inputs(model, embeddings, ids, rows), known)
    if length:
        model.last_prefix.put(embeddings, sequence, length, keys)
    return keys


def _native_prefix(model: Model, native: NativeDecoder, x: Tensor, known: Tensor | None) -> Tensor:
    """The keys and values `known` [L, 2, m, G, D], followed by those of n tokens with the embeddings x [n, d]."""
    config = model.config
    start = 0 if known is None else known.shape[2]
    shape = (config.num_layers, 2, 1, start + len(x), config.num_kv_heads, config.head_dim)
    nothing, own = torch.empty(*shape[:2], 0, *shape[4:]), torch.empty(shape)
    if known is not None:
        own[:, :, 0, :start] = known
    positions, none = torch.arange(start, start + len(x)), torch.empty(0, dtype=torch.int64)
    native.advance(nothing, own, torch.zeros(len(x), dtype=torch.int64), positions, x, none)
    return own[:, :, 0]


def prefill_suffixes(
    model: Model, embeddings: Tensor, batch: Sequence[Rendered], prefix: Tensor
) -> tuple[KeyValueCache, Tensor]:
    """(KV cache of the B sequences, logits [B, V] for their next tokens). Computes what follows the prefix.

    embeddings: [k, d], the prompt rows. prefix: [L, 2, S, G, D], keys and values of each sequence's first S tokens.
    """
    shared = prefix.shape[2]
    lengths = torch.tensor([len(s.ids) - shared for s in batch])
    cache = KeyValueCache(model, prefix, lengths)
    sequence = torch.repeat_interleave(torch.arange(len(batch)), lengths)
    at = torch.cat([torch.arange(int(n)) for n in lengths])
    native = _in_blocks(model)
    if native is not None:
        ids, rows = [i for s in batch for i in s.ids[shared:]], [r for s in batch for r in s.prompt_rows[shared:]]
        x = _inputs(model, embeddings, ids, rows)
        return cache, native.advance(cache.prefix, cache.own, sequence, shared + at, x, lengths.cumsum(0) - 1)
    tree = pack_branches(batch, shared)
    places = cache.rows(sequence, at).to(model.device)
    p = PrefixPass.keeping(
        build_pass(
            model.config, tree, (prefix,) if shared else (), model.ops, model.dtype, model.device, rows=tree.leaves,
            prompt_only=False,
        ),
        lambda layer: cache.cache_rows(layer, places),
    )  # fmt: skip
    model.arena.begin(activation_bytes(model.config, p.size, model.dtype, None, model.ops))
    hidden = model.decoder.keys_and_values(embeddings, p)
    assert hidden is not None
    return cache, cache.logits(hidden)


def _in_blocks(model: Model) -> NativeDecoder | None:
    native = model.native_decoder
    return native if native is not None and native.in_blocks else None


def _inputs(model: Model, embeddings: Tensor, ids: Sequence[int], prompt_rows: Sequence[int]) -> Tensor:
    """The first layer's input, [T, d] float32: prompt rows where `prompt_rows` is not −1, else embeddings of `ids`."""
    rows = torch.tensor(prompt_rows)
    x = model.weights.embedding[torch.tensor(ids)].float()
    return torch.where((rows >= 0)[:, None], embeddings[rows.clamp_min(0)], x)
