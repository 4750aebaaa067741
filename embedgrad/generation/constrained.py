"""Constrained generation: an answer must be one of the given continuations.

The continuations are merged into a trie with one node for each common prefix. A sequence is at a node, and its next
token must lead to one of the node's children. The compiled samplers (`SamplingBatch`, `AdvanceBatch` in `csrc/common/`)
read the arrays of the trie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from embedgrad.util.errors import ConfigError


@dataclass(frozen=True)
class ForcedChoice:
    """A trie of continuations. A sequence begins at node 0; a node without children completes the answer.

    children: [nodes + 1] int32, for each node the index of its first entry in the two arrays below.
    child_tokens: [edges] int32, the tokens that may follow, ascending within a node.
    child_nodes: [edges] int32, the node that each of these tokens leads to.
    """

    children: np.ndarray
    child_tokens: np.ndarray
    child_nodes: np.ndarray

    @classmethod
    def among(cls, continuations: Sequence[Sequence[int]], end: int) -> ForcedChoice:
        """The trie of `continuations` (token ids).

        Where a continuation is a prefix of another one, the stop token `end` may follow it too. Tokens are chosen one
        after another; the probability of a whole continuation is not compared. Raises ConfigError where there is no
        continuation or one of them is empty.
        """
        if not continuations or not all(len(c) for c in continuations):
            raise ConfigError("a forced choice needs at least one continuation, and none of them empty.")
        rest = [tuple(int(token) for token in c) for c in continuations]
        nodes = [dict(_branches(rest, end))]
        tables: list[list[tuple[int, int]]] = []
        for branches in nodes:  # the loop appends to `nodes`, in breadth-first order
            table = []
            for token, tails in branches.items():
                table.append((token, len(nodes)))
                nodes.append(dict(_branches(tails, end)))
            tables.append(table)
        edges = [edge for table in tables for edge in table]
        return cls(
            np.cumsum([0] + [len(table) for table in tables], dtype=np.int32),
            np.array([token for token, _ in edges], dtype=np.int32),
            np.array([node for _, node in edges], dtype=np.int32),
        )

    def candidates(self, node: int) -> list[int]:
        """The tokens that may follow at `node`, ascending."""
        return self.child_tokens[self.children[node] : self.children[node + 1]].tolist()

    def follow(self, node: int, token: int) -> int:
        """The node that `token`, one of the candidates, leads to."""
        return int(self.child_nodes[self.children[node] + self.candidates(node).index(token)])


def forest(trees: Sequence[ForcedChoice]) -> tuple[ForcedChoice, list[int]]:
    """(all trees in one set of arrays, the node at which each begins)."""
    roots, edges = [0], [0]
    for tree in trees:
        roots.append(roots[-1] + len(tree.children) - 1)
        edges.append(edges[-1] + len(tree.child_tokens))
    children = [tree.children[:-1] + edge for tree, edge in zip(trees, edges, strict=False)]
    nodes = [tree.child_nodes + root for tree, root in zip(trees, roots, strict=False)]
    whole = ForcedChoice(
        np.concatenate([*children, np.array([edges[-1]])]).astype(np.int32),
        np.concatenate([tree.child_tokens for tree in trees]).astype(np.int32),
        np.concatenate(nodes).astype(np.int32),
    )
    return whole, roots[:-1]


def _branches(rest: Sequence[tuple[int, ...]], end: int) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """(first token, tails after it), ascending by token; also `end` where only some of the tails are empty."""
    tails: dict[int, list[tuple[int, ...]]] = {}
    for tokens in rest:
        if tokens:
            tails.setdefault(tokens[0], []).append(tokens[1:])
    if tails and not all(rest):
        tails.setdefault(end, []).append(())
    yield from sorted(tails.items())
