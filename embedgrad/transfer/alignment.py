"""Which tokens of one tokenisation stand for which of another, by the characters that they share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedgrad.model.tokenizer import Tokenizer

Span = tuple[int, int]


def spans(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> list[Span]:
    """The characters [start, end) of `text` that each of `ids` stands for.

    Where `text` has other tokens than `ids` (a prompt that was made of ids), the spans are those of the text that the
    ids give one after another.
    """
    own, offsets = tokenizer.encode_with_offsets(text)
    if own == list(ids):
        return offsets
    ends = [len(tokenizer.decode(ids[: n + 1], skip_special=False)) for n in range(len(ids))]
    return [(start, max(start, end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def shares(source: Sequence[Span], target: Sequence[Span]) -> Tensor:
    """[k_t, k_s] float64: which share of each target token's characters stands in which source token.

    Rows add up to 1, or to 0 where a target token has no character in common with any source token. A character that
    several source tokens share (they are its bytes) counts for each of them in equal parts.
    """
    found = torch.zeros(len(target), len(source), dtype=torch.float64)
    for i, (start, end) in enumerate(target):
        for j, (first, last) in enumerate(source):
            found[i, j] = max(0, min(end, last) - max(start, first))
    whole = found.sum(dim=1, keepdim=True)
    return torch.where(whole > 0, found / whole.clamp_min(1e-12), 0.0)
