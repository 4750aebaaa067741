"""Logits in float32, a block of targets at a time, in a workspace of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from embedgrad.backends.base import Head

DEVICE_LOGIT_BYTES = 256 << 20  # of logits that exist at once on a GPU
ALIGNED = 4  # float32 values: rows of logits begin at multiples of 16 bytes, which BLAS's fast products ask for


def padded(vocabulary: int) -> int:
    """How far apart rows of logits lie, in elements."""
    return -(-vocabulary // ALIGNED) * ALIGNED


def logit_rows(count: int, vocabulary: int, limit: int) -> int:
    """How many of `count` rows of logits `limit` bytes have room for; at least one."""
    return min(count, max(1, limit // (padded(vocabulary) * 4)))


def logit_blocks(h: Tensor, head: Head, workspace: Tensor | None, limit: int) -> Iterator[tuple[slice, Tensor]]:
    """Each block of rows of h [N, d], and its logits z [n, V] float32, which are valid until the next block.

    workspace: uint8, of `logit_rows` rows of `padded` logits; allocated where it is None. limit: its bytes.
    """
    vocabulary, step = head.shape[0], logit_rows(len(h), head.shape[0], limit)
    row, nbytes = padded(vocabulary), step * padded(vocabulary) * 4
    memory = torch.empty(nbytes, dtype=torch.uint8, device=h.device) if workspace is None else workspace
    z = memory[:nbytes].view(torch.float32).view(step, row)[:, :vocabulary]
    for start in range(0, len(h), max(step, 1)):
        rows = slice(start, min(start + step, len(h)))
        yield rows, head.forward(h[rows], out=z[: rows.stop - start])
