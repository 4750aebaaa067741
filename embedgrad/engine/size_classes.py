"""Which sizes the passes of a run are padded to, so that a few captured graphs serve all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embedgrad.engine.packed_pass import PassSize

WASTE = 0.03  # largest share of padding tokens, on average over the passes
MOST = 32  # classes
DISTINCT = 256  # numbers of tokens that the search tells apart


def size_classes(sizes: Sequence[PassSize]) -> list[PassSize]:
    """As few classes as keep the padding of `sizes` within WASTE (but at most MOST), smallest first.

    Every size fits the first class with as many tokens or more. A class has one token more than its largest member, for
    whatever else is padded to point to.
    """
    tokens = np.sort(np.array([size.tokens for size in sizes]))
    values, counts = _distinct(tokens)
    starts = _partition(values, counts, float(tokens.sum()) * WASTE)
    bounds = [int(values[end - 1]) for end in [*starts[1:], len(values)]]
    members: list[list[PassSize]] = [[] for _ in bounds]
    for size in sizes:
        members[int(np.searchsorted(bounds, size.tokens))].append(size)
    return [_class_of(each) for each in members if each]


def fitting(size: PassSize, classes: Sequence[PassSize]) -> PassSize | None:
    """The smallest class that `size` fits, or None."""
    return next((each for each in classes if _fits(size, each)), None)


def _fits(size: PassSize, into: PassSize) -> bool:
    if size.in_order < into.in_order or size.tokens >= into.tokens:
        return False
    pairs = zip(_parts(size), _parts(into), strict=True)
    return all(a <= b for a, b in pairs) and (size.rows is None) == (into.rows is None)


def _parts(size: PassSize) -> tuple[int, ...]:
    return size.tokens, size.prefix, size.rows or 0, size.shown or 0, size.targets


def _class_of(sizes: Sequence[PassSize]) -> PassSize:
    tokens, prefix, rows, shown, targets = (max(part) for part in zip(*map(_parts, sizes), strict=True))
    first = sizes[0]
    return PassSize(
        tokens + 1,
        prefix,
        None if first.rows is None else rows,
        None if first.shown is None else shown,
        targets,
        all(size.in_order for size in sizes),
    )


def _distinct(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of tokens that occur, and how often; rounded up to quantiles where there are many."""
    values, counts = np.unique(tokens, return_counts=True)
    if len(values) > DISTINCT:
        edges = np.unique(tokens[np.linspace(0, len(tokens) - 1, DISTINCT).astype(int)])
        values, counts = np.unique(edges[np.searchsorted(edges, tokens)], return_counts=True)
    return values, counts


def _partition(values: np.ndarray, counts: np.ndarray, allowed: float) -> list[int]:
    """Where each class begins: the best split of `values` into as few classes as keep the padding within `allowed`.

    Dynamic programming over the number of classes: cost[j] is the least padding of values[:j] in that many classes.
    """
    n = len(values)
    number, total = np.concatenate([[0], counts.cumsum()]), np.concatenate([[0], (counts * values).cumsum()])
    # padding [i, j − 1]: of values[i:j] in one class
    padding = values[None, :] * (number[None, 1:] - number[:n, None]) - (total[None, 1:] - total[:n, None])
    padding = np.where(np.arange(n)[:, None] <= np.arange(n)[None, :], padding.astype(float), np.inf)
    cost = np.concatenate([[0.0], np.full(n, np.inf)])
    came_from: list[np.ndarray] = []
    while len(came_from) < MOST and (not came_from or cost[n] > allowed):
        options = cost[:n, None] + padding
        came_from.append(options.argmin(0))
        cost = np.concatenate([[np.inf], options.min(0)])
    starts, end = [], n
    for choice in reversed(came_from):
        end = int(choice[end - 1])
        starts.append(end)
    return starts[::-1]
