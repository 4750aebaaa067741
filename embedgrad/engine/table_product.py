"""The best products of some rows with the embedding table, block by block: never all [k, V] products at once.

For a gradient g [k, d] at the prompt rows, −g_i · E_v is the first-order change of the loss where row i shows token v
instead of its own, up to a constant of the row. That is the gradient at the one-hot choice of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.engine.model import Model

ROWS = 8192  # rows of the table that are multiplied at once: k · ROWS products exist at a time


@dataclass(frozen=True)
class Best:
    """The largest values of each row, in descending order, [k, c] on the CPU, and their token ids [k, c] int64."""

    values: Tensor
    ids: Tensor


def best_tokens(
    model: Model,
    rows: Tensor,
    count: int,
    *,
    allowed: Tensor | None = None,
    cosine: bool = False,
    head_rows: Tensor | None = None,
) -> Best:
    """The `count` tokens v with the largest rows_i · E_v for each of `rows` [k, d].

    allowed [V] bool: tokens that may be taken; None: all of the table. cosine: the cosine instead of the product; zero
    rows of the table are then never taken. head_rows [k, d]: adds head_rows_i · H_v, with the rows H of the head; not
    with `cosine`. Products are float32, or float64 in a model that computes in float64, on the model's device. Where
    fewer than `count` tokens are allowed there are as many columns as allowed tokens. Of equal values any may come
    first, but the same call gives the same. Works with every backend: the products are one call of BLAS or cuBLAS a
    block. Cost: 2·k·d·V operations, and one pass over the table.
    """
    kind = torch.float64 if model.dtype == torch.float64 else torch.float32
    table = model.weights.embedding
    size = len(table)
    usable = torch.ones(size, dtype=torch.bool) if allowed is None else allowed
    count = min(count, int(usable.sum()))
    wanted = rows.detach().to(model.device, kind)
    if cosine:
        wanted = torch.nn.functional.normalize(wanted, dim=1)
    at_head = None if head_rows is None else head_rows.detach().to(model.device, model.dtype)
    values = torch.full((len(rows), 0), -torch.inf, dtype=kind, device=model.device)
    ids = torch.zeros((len(rows), 0), dtype=torch.int64, device=model.device)
    for start in range(0, size, ROWS):
        stop = min(start + ROWS, size)
        block = table[start:stop].to(model.device, kind)
        product = wanted @ block.T
        closed = ~usable[start:stop].to(model.device)
        if cosine:
            length = block.norm(dim=1)
            product /= length.clamp_min(torch.finfo(kind).tiny)
            closed |= length == 0
        if at_head is not None:
            out = torch.empty(len(rows), stop - start, dtype=model.dtype, device=model.device)
            product += model.weights.head.rows(start, stop).forward(at_head, out).to(kind)
        product[:, closed] = -torch.inf
        found, at = product.topk(min(count, stop - start), dim=1)
        values, ids = torch.cat([values, found], dim=1), torch.cat([ids, at + start], dim=1)
        values, order = values.topk(min(count, values.shape[1]), dim=1)
        ids = ids.gather(1, order)
    return Best(values.cpu(), ids.cpu())
