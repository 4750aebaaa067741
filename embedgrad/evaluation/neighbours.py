"""The vocabulary's tokens that are nearest to the prompt rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.engine.model import Model

_CLOSE = 1e-6  # smaller differences of cosines are ignored; float32 rounds a sum of d products by about as much


@dataclass(frozen=True)
class Neighbours:
    """For each prompt row its neighbours among the rows of the embedding table.

    nearest: id of the token with the largest cosine. cosine: that cosine. own_rank: rank, by cosine, of the token that
    the prompt row started from; 1 if no other token is nearer.
    """

    nearest: list[int]
    cosine: list[float]
    own_rank: list[int]


def neighbours(model: Model, embeddings: Tensor, token_ids: Sequence[int]) -> Neighbours:
    """The neighbours of the prompt rows `embeddings` [k, d], which started from `token_ids`.

    Of tokens with equal cosines the smallest id is taken. Zero rows of the embedding table are never neighbours. The
    cost is one product with the table: 2·k·d·V operations and one pass over its V·d numbers, a few thousand rows at a
    time.
    """
    rows = torch.nn.functional.normalize(embeddings.detach().cpu().float(), dim=1)
    own = torch.nn.functional.cosine_similarity(rows, model.embedding_rows(list(token_ids)), dim=1)
    best = torch.full((len(rows),), -2.0)
    ids = torch.zeros(len(rows), dtype=torch.int64)
    nearer = torch.zeros(len(rows), dtype=torch.int64)
    for first, table in model.embedding_table_chunks():
        length = table.norm(dim=1)
        cosine = (rows @ table.T) / length.clamp_min(torch.finfo(torch.float32).tiny)
        cosine[:, length == 0] = -2.0
        value, index = cosine.max(dim=1)
        better = value > best
        best, ids = torch.where(better, value, best), torch.where(better, index + first, ids)
        nearer += (cosine > own[:, None] + _CLOSE).sum(dim=1)
    return Neighbours(ids.tolist(), best.tolist(), (nearer + 1).tolist())
