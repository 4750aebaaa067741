"""The loss at the targets, and its gradient at the hidden states that the head reads (docs/design.md, section 4)."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from embedgrad.backends.base import Head
from embedgrad.engine.decoder import Decoder
from embedgrad.engine.packed_pass import Targets


def target_loss(
    decoder: Decoder, head: Head, hidden: Tensor, targets: Targets, *, differentiate: bool, whole: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per target its negative log-likelihood [N] and the arg-max token [N]; and dh [R, d] where it is wanted.

    hidden [R, d]: what the decoder's forward returned. whole: all logits at once, on a backend that holds them.
    """
    ops, arena, slot, (rows, width) = decoder.ops, decoder.arena, targets.slot, hidden.shape
    at_targets, dh, count = hidden, None, len(targets.ids)
    if slot is not None:
        take = arena.keep if differentiate else arena.scratch
        at_targets = ops.take_rows(hidden, slot, out=take(count, width, dtype=hidden.dtype))
    if differentiate:
        dh = arena.keep(*at_targets.shape, dtype=hidden.dtype)
    with arena.frame():
        nbytes = 0 if whole else ops.linear_cross_entropy_bytes(count, head.shape[0], hidden.dtype)
        nll, predicted = ops.linear_cross_entropy(  # (14)
            at_targets, head, targets.ids, targets.weights,
            softcap=decoder.config.logit_softcap,
            dh=dh,
            workspace=arena.scratch(nbytes, dtype=torch.uint8) if nbytes else None,
            logit_bytes=sys.maxsize if whole else None,
        )  # fmt: skip
    if dh is not None and slot is not None:
        at_hidden = arena.keep(rows, width, dtype=hidden.dtype)
        with arena.frame():  # `embed_backward` adds in a fixed order; index_add_ does not on every device
            sums = arena.scratch(rows, width, dtype=decoder.sum_dtype)
            dh = at_hidden.copy_(ops.embed_backward(dh, slot, grad=sums))
    return nll, predicted, dh
