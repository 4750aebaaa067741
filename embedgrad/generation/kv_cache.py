"""The KV cache, and the decoder's forward pass for one new token of each sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.backends.base import CacheRows
from embedgrad.engine.arena import Arena
from embedgrad.engine.attention import Attention
from embedgrad.engine.decoder import Decoder
from embedgrad.engine.memory import activation_bytes
from embedgrad.engine.model import Model
from embedgrad.engine.packed_pass import PassSize, Rotations, rotations

GROWTH = 64  # tokens by which the cache grows when it is full


class KeyValueCache:
    """The KV cache of B sequences that share a prefix.

    prefix: [L, 2, S, G, D], keys and values of the shared prefix.
    own: [L, 2, B, C, G, D], keys and values of each sequence after the prefix. C is the capacity in tokens.
    lengths: [B], the number of tokens of each sequence in `own`.

    `advance` works in place and does not wait for the device while the capacity suffices, so that a CUDA graph can
    capture it. When the capacity is used up, `own` is reallocated.
    """

    def __init__(self, model: Model, prefix: Tensor, lengths: Tensor) -> None:
        config = model.config
        self.model = model
        self.prefix = prefix.contiguous()
        self.lengths = lengths.to(model.device, copy=True)
        self._longest = int(lengths.max())
        self._decoder = Decoder(config, model.weights, model.ops, model.dtype, Arena(model.device))
        size = PassSize(len(lengths), 0, None, None, 0)
        self._nbytes = activation_bytes(config, size, model.dtype, None, model.ops)
        self.own = torch.empty(
            config.num_layers, 2, len(lengths), self._longest + GROWTH, config.num_kv_heads, config.head_dim,
            dtype=model.dtype, device=model.device,
        )  # fmt: skip

    @property
    def batch(self) -> int:
        """Number of sequences, B."""
        return len(self.lengths)

    def rows(self, sequence: Tensor, at: Tensor) -> Tensor:
        """Rows [T] of `cache_rows` for positions `at` [T] in the sequences `sequence` [T]."""
        return sequence * self.own.shape[3] + at

    def cache_rows(self, layer: int, rows: Tensor) -> CacheRows:
        """Where the layer's keys and values of T tokens go: all sequences' positions in one row of rows [B·C, G, D]."""
        keys, values = self.own[layer].view(2, -1, *self.own.shape[4:])
        return CacheRows(keys, values, rows)

    def keep(self, sequences: Tensor) -> None:
        """Removes all sequences but `sequences` [n] (indices, ascending)."""
        self.own = self.own.index_select(2, sequences)
        self.lengths = self.lengths[sequences]

    def join(self, other: KeyValueCache) -> None:
        """Appends the sequences of `other`, which must have the same prefix, to this cache's sequences."""
        missing = other.own.shape[3] - self.own.shape[3]
        if missing > 0:
            self.grow(missing)
        grown = torch.empty_like(self.own[:, :, :1]).expand(-1, -1, other.batch, -1, -1, -1).contiguous()
        grown[:, :, :, : other.own.shape[3]] = other.own
        self.own = torch.cat([self.own, grown], dim=2)
        self.lengths = torch.cat([self.lengths, other.lengths])
        self._longest = max(self._longest, other._longest)

    def next_logits(self, ids: Tensor) -> Tensor:
        """Appends the tokens `ids` [B] and returns the logits [B, V] for the tokens after them."""
        native = self.model.native_decoder
        if native is None:
            return self.logits(self.advance(ids))
        self._longest += 1
        if self._longest > self.own.shape[3]:
            self.grow()
        every = torch.arange(self.batch)
        logits = native.advance(self.prefix, self.own, every, self.prefix.shape[2] + self.lengths, ids, every)
        self.lengths += 1
        return logits

    def advance(self, ids: Tensor) -> Tensor:
        """Appends the tokens `ids` [B]. Returns their hidden states after the final norm, [B, d], valid until the next
        call."""
        at = self.lengths.clone()
        self.lengths += 1
        self._longest += 1  # an upper bound of `lengths` that the host knows without waiting for the device
        if self._longest > self.own.shape[3]:
            self.grow()
        turns = rotations(self.model.config, self.prefix.shape[2] + at, self.model.dtype)
        self._decoder.arena.begin(self._nbytes)
        rows = self.rows(torch.arange(self.batch, device=at.device), at)
        return self._decoder.next_hidden(ids, _NextTokens(self, turns, rows, self._first_seen()))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits [B, V] of hidden states [B, d] after the final norm, in float32 (float64 for a float64 model)."""
        if self.model.native_decoder is not None:
            found = self.model.native_decoder.logits(hidden)
            return self._capped(found if out is None else out.copy_(found))
        head = self.model.weights.head
        if out is None:
            wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
            out = torch.empty(len(hidden), head.shape[0], dtype=wide, device=hidden.device)
        return self._capped(head.forward(hidden, out=out))

    def _capped(self, logits: Tensor) -> Tensor:
        """c·tanh(logits / c) in place, where the model has a cap."""
        cap = self.model.config.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def mark(self) -> tuple[Tensor, int]:
        """A mark of the present state, for `rewind`."""
        return self.lengths.clone(), self._longest

    def rewind(self, mark: tuple[Tensor, int]) -> None:
        """Goes back to an earlier state of the same sequences. Tokens that were appended after `mark` are removed."""
        lengths, self._longest = mark
        self.lengths.copy_(lengths)

    def _first_seen(self) -> dict[int | None, Tensor | None]:
        """For each sliding window, the position [B] of the first key that each sequence sees; None: it sees all."""
        length = self.prefix.shape[2] + self.lengths
        return {
            window: None if window is None else (length - window).clamp_min(0)
            for window in set(self.model.config.windows)
        }

    def grow(self, places: int = GROWTH) -> None:
        """Adds capacity for `places` more tokens in each sequence. Reallocates `own`."""
        old, shape = self.own, list(self.own.shape)
        shape[3] += places
        self.own = torch.empty(shape, dtype=old.dtype, device=old.device)
        self.own[:, :, :, : old.shape[3]] = old


@dataclass(frozen=True)
class _NextTokens:
    """The forward pass of one new token for each sequence of a cache; rows [B]: see `KeyValueCache.rows`."""

    cache: KeyValueCache
    turns: Rotations
    rows: Tensor
    first_seen: dict[int | None, Tensor | None]

    def rotation(self, index: int) -> tuple[Tensor, Tensor]:
        """cos and sin [B, D/2] of a layer."""
        return self.turns[index]

    def cache_rows(self, index: int) -> CacheRows:
        """The new token's place in each sequence."""
        return self.cache.cache_rows(index, self.rows)

    def attend(self, attention: Attention, index: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> None:
        """o [B, H, D]: attention to the prefix and to each sequence's own keys, including the new one. No lse."""
        cache, window = self.cache, attention.config.windows[index]
        attention.ops.decode_attention(
            q, cache.prefix[index, 0], cache.prefix[index, 1], cache.own[index, 0], cache.own[index, 1], cache.lengths,
            scale=attention.scale, softcap=attention.softcap, first_seen=self.first_seen[window], out=o,
        )  # fmt: skip

    def attend_backward(self, *_: object) -> None:
        """Raises NotImplementedError, because new tokens are not differentiated."""
        raise NotImplementedError("new tokens are not differentiated")
