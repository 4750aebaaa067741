"""Forced choice: an answer that must be one of some given continuations.

They are merged into a tree, one node per common beginning. A sequence stands at a node; the tokens that may follow are
the node's children. The compiled samplers (`SamplingBatch`, `AdvanceBatch` in `csrc/common/`) read these arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from embedgrad.errors import ConfigError


@dataclass(frozen=True)
class ForcedChoice:
    """A tree of continuations; a sequence begins at node 0.

    children [nodes + 1] int32: where each node's entries begin in the arrays below. child_tokens [edges] int32: the
    tokens that may follow, ascending within a node. child_nodes [edges] int32: the node each leads to. A node without
    children completes the answer.
    """

    children: np.ndarray
    child_tokens: np.ndarray
    child_nodes: np.ndarray

    @classmethod
    def among(cls, continuations: Sequence[Sequence[int]], end: int) -> ForcedChoice:
        """The tree of `continuations` (token ids). Where one continuation is the beginning of another, the stop token
        `end` is a choice too. Tokens are chosen one after another, not whole continuations by their probability.

        Raises ConfigError where there is none, or where one is empty.
        """
        if not continuations or not all(len(c) for c in continuations):
            raise ConfigError("a forced choice needs at least one continuation, and none of them empty.")
        rest = [tuple(int(token) for token in c) for c in continuations]
        nodes = [dict(_branches(rest, end))]
        tables: list[list[tuple[int, int]]] = []
        for branches in nodes:  # grows while it is walked: breadth first
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


def _branches(rest: Sequence[tuple[int, ...]], end: int) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """First tokens, ascending, with what follows each; where some rests are over and others are not, `end` as well."""
    tails: dict[int, list[tuple[int, ...]]] = {}
    for tokens in rest:
        if tokens:
            tails.setdefault(tokens[0], []).append(tokens[1:])
    if tails and not all(rest):
        tails.setdefault(end, []).append(())
    yield from sorted(tails.items())
