"""One new token for each of several sequences behind a shared trunk: the decoder's forward with a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from embedgrad.model.model import Model
from embedgrad.model.step import rotations

GROWTH = 64  # tokens by which the cache grows when it is full


class KeyValueCache:
    """Keys and values of a shared trunk and of B sequences behind it.

    trunk [L, 2, S, G, D]; own [L, 2, B, C, G, D], of which `lengths` [B] count; C grows as tokens come. As long as it
    need not grow, `advance` works in place and asks the device for nothing, so that a CUDA graph can hold it.
    """

    def __init__(self, model: Model, trunk: Tensor, lengths: Tensor) -> None:
        config = model.config
        self.model = model
        self.trunk = trunk.contiguous()
        self.lengths = lengths.to(model.device, copy=True)
        self._longest = int(lengths.max())
        self.own = torch.empty(
            config.num_layers, 2, len(lengths), self._longest + GROWTH, config.num_kv_heads, config.head_dim,
            dtype=model.dtype, device=model.device,
        )  # fmt: skip

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def fill(self, layer: int, k: Tensor, v: Tensor, sequence: Tensor, at: Tensor) -> None:
        """Put packed keys and values [T, G, D] into places `at` [T] of the sequences `sequence` [T]."""
        self.own[layer, 0, sequence, at] = k
        self.own[layer, 1, sequence, at] = v

    def keep(self, sequences: Tensor) -> None:
        """Forget all sequences but `sequences` [n] (indices, ascending)."""
        self.own = self.own[:, :, sequences]
        self.lengths = self.lengths[sequences]

    def join(self, other: KeyValueCache) -> None:
        """Take the sequences of `other`, which has the same trunk, behind this one's own."""
        missing = other.own.shape[3] - self.own.shape[3]
        if missing > 0:
            self.grow(missing)
        grown = torch.empty_like(self.own[:, :, :1]).expand(-1, -1, other.batch, -1, -1, -1).contiguous()
        grown[:, :, :, : other.own.shape[3]] = other.own
        self.own = torch.cat([self.own, grown], dim=2)
        self.lengths = torch.cat([self.lengths, other.lengths])
        self._longest = max(self._longest, other._longest)

    def next_logits(self, ids: Tensor) -> Tensor:
        """Append the tokens `ids` [B] and return the logits [B, V] of the next ones."""
        native = self.model.native_decoder
        if native is None:
            return self.logits(self.advance(ids))
        self._longest += 1
        if self._longest > self.own.shape[3]:
            self.grow()
        every = torch.arange(self.batch)
        logits = native.advance(self.trunk, self.own, every, self.trunk.shape[2] + self.lengths, ids, every)
        self.lengths += 1
        return logits

    def advance(self, ids: Tensor) -> Tensor:
        """Append the tokens `ids` [B] and return their final-normed hidden states [B, d]."""
        model, config = self.model, self.model.config
        ops, eps, (h, g, size) = model.ops, config.rms_eps, model.decoder.heads
        batch, dtype, device = self.batch, model.dtype, model.device
        every = torch.arange(batch, device=device)
        cos, sin = rotations(config, self.trunk.shape[2] + self.lengths, dtype)
        at = self.lengths.clone()
        self.lengths += 1
        self._longest += 1  # at least the largest of `lengths`, known without asking the device
        if self._longest > self.own.shape[3]:
            self.grow()
        first_seen = self._first_seen()

        def new(columns: int) -> Tensor:
            return torch.empty(batch, columns, dtype=dtype, device=device)

        x, normed = model.weights.embedding[ids].to(dtype), new(config.hidden_size)
        qkv, o = new((h + 2 * g) * size), new(h * size)
        gate_up, activation = new(2 * config.intermediate_size), new(config.intermediate_size)
        for index, layer in enumerate(model.weights.layers):
            ops.rms_norm(x, layer.attention_norm, eps, out=normed)
            layer.qkv.forward(normed, out=qkv)
            ops.rope(qkv, cos, sin, (h, g, size), q_norm=layer.q_norm, k_norm=layer.k_norm, eps=eps)
            q, k, v = qkv.split((h * size, g * size, g * size), dim=1)
            own = self.own[index]
            own[0, every, at] = k.unflatten(1, (g, size))
            own[1, every, at] = v.unflatten(1, (g, size))
            ops.decode_attention(
                q.unflatten(1, (h, size)), *self.trunk[index], *own, self.lengths,
                scale=model.decoder.scale, first_seen=first_seen[config.windows[index]], out=o.view(batch, h, size),
            )  # fmt: skip
            x = layer.out.forward(o, out=new(config.hidden_size), add=x)
            ops.rms_norm(x, layer.mlp_norm, eps, out=normed)
            layer.gate_up.forward(normed, out=gate_up)
            ops.swiglu(gate_up, out=activation)
            x = layer.down.forward(activation, out=new(config.hidden_size), add=x)
        return ops.rms_norm(x, model.weights.final_norm, eps, out=normed)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, V] of final-normed hidden states [B, d]."""
        if self.model.native_decoder is not None:
            return self.model.native_decoder.logits(hidden)
        head = self.model.weights.head
        out = torch.empty(len(hidden), head.shape[0], dtype=hidden.dtype, device=hidden.device)
        return head.forward(hidden, out=out)

    def mark(self) -> tuple[Tensor, int]:
        """The present state, for `rewind`."""
        return self.lengths.clone(), self._longest

    def rewind(self, mark: tuple[Tensor, int]) -> None:
        """Back to an earlier state of the same sequences: what came after it is forgotten."""
        lengths, self._longest = mark
        self.lengths.copy_(lengths)

    def _first_seen(self) -> dict[int | None, Tensor | None]:
        """For each sliding window the first key, counted through trunk and own, that each sequence [B] still sees."""
        length = self.trunk.shape[2] + self.lengths
        return {
            window: None if window is None else (length - window).clamp_min(0)
            for window in set(self.model.config.windows)
        }

    def grow(self, places: int = GROWTH) -> None:
        """Room for `places` more tokens of each sequence; `own` moves."""
        old, shape = self.own, list(self.own.shape)
        shape[3] += places
        self.own = torch.empty(shape, dtype=old.dtype, device=old.device)
        self.own[:, :, :, : old.shape[3]] = old
