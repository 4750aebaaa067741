"""Divides the sequences of a step among processes: packed tokens even, siblings of the tree together.

Each part becomes a tree of its own. So what two parts share is computed twice, and the cost of a part is the number of
tokens of its own tree. Two divisions are tried, and the one whose largest part is smaller is taken:

- a cut of the depth-first order into runs of neighbours, at the cuts that make the largest run smallest. Neighbours
  share most, so that siblings are separated only where a part would be too large otherwise.
- the branches below what all sequences share, the largest first, each to the part that is smallest so far.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from embedgrad.engine.tree import PreparedSequence


def split_batch(sequences: Sequence[PreparedSequence], parts: int) -> list[list[int]]:
    """Indices of the sequences of each part, ascending; parts may be empty. A function of its arguments alone."""
    if parts == 1 or not sequences:
        return [list(range(len(sequences))), *([] for _ in range(parts - 1))]
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].symbols.tolist(), i))
    own = [len(sequences[i].symbols) - len(sequences[i].paths) for i in order]
    shared = [0, *(_packed_in_common(sequences[a], sequences[b]) for a, b in pairwise(order))]
    divisions = (_runs(own, shared, parts), _branches(own, shared, parts))
    best = min(divisions, key=lambda division: max(_cost(part, own, shared) for part in division))
    return [sorted(order[at] for at in part) for part in best]


def _packed_in_common(one: PreparedSequence, other: PreparedSequence) -> int:
    """Packed tokens that two sequences share; prefix units, which are computed once in a run, do not count."""
    length = min(len(one.symbols), len(other.symbols))
    differ = np.flatnonzero(one.symbols[:length] != other.symbols[:length])
    common = int(differ[0]) if len(differ) else length
    return max(common - len(one.paths), 0)


def _cost(part: Sequence[int], own: Sequence[int], shared: Sequence[int]) -> int:
    """Packed tokens of a part; its places in the depth-first order are ascending."""
    total = own[part[0]] if part else 0
    for before, after in pairwise(part):
        total += own[after] - min(shared[before + 1 : after + 1])
    return total


def _runs(own: Sequence[int], shared: Sequence[int], parts: int) -> list[list[int]]:
    """The cut into at most `parts` runs whose largest is smallest, by bisection of that size."""

    def cut(limit: int) -> list[list[int]]:
        runs: list[list[int]] = [[0]]
        size = own[0]
        for at in range(1, len(own)):
            more = own[at] - shared[at]
            if size + more > limit:
                runs.append([])
                size, more = 0, own[at]
            runs[-1].append(at)
            size += more
        return runs

    low, high = max(own), sum(own)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= parts else (middle + 1, high)
    runs = cut(low)
    return runs + [[] for _ in range(parts - len(runs))]


def _branches(own: Sequence[int], shared: Sequence[int], parts: int) -> list[list[int]]:
    """The branches below what all share, the largest first, each to the smallest part."""
    common = min(shared[1:], default=0)
    branches: list[list[int]] = [[]]
    for at in range(len(own)):
        if branches[-1] and shared[at] - common <= (own[at] - common) // 2:  # shares less than half: no sibling
            branches.append([])
        branches[-1].append(at)
    sized = sorted(((_cost(branch, own, shared) - common, branch) for branch in branches), key=lambda b: (-b[0], b[1]))
    heap: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(parts)]
    for size, branch in sized:
        total, number, members = heapq.heappop(heap)
        heapq.heappush(heap, (total + size, number, sorted([*members, *branch])))
    return [members for _, _, members in sorted(heap, key=lambda part: part[1])]
