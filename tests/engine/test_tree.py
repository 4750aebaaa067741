"""The packed tree says exactly what the sequences it was built from say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.backends.reference import blocks
from embedgrad.engine.tree import TokenTree, build_tree, pack_branches


@dataclass(frozen=True)
class Sequence:
    ids: list[int]
    prompt_rows: list[int]
    target_mask: list[bool]
    constant_prefix: int


@st.composite
def sequences(draw: Any) -> list[Sequence]:
    """Sequences over a tiny alphabet, so that they share much; a constant header, a question, a prompt, an answer."""
    header = draw(st.lists(st.integers(0, 2), max_size=3))
    prompt = draw(st.integers(1, 3))
    result = []
    for _ in range(draw(st.integers(1, 6))):
        question = draw(st.lists(st.integers(0, 2), max_size=4)) if draw(st.booleans()) else []
        query = draw(st.lists(st.integers(0, 2), max_size=4))
        answer = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))
        ids = header + question + [9] * prompt + query + answer
        rows = [-1] * (len(header) + len(question)) + list(range(prompt)) + [-1] * (len(query) + len(answer))
        targets = [False] * (len(ids) - len(answer)) + [True] * len(answer)
        result.append(Sequence(ids, rows, targets, draw(st.integers(0, len(header)))))
    return result


def path_of(tree: TokenTree, i: int) -> list[tuple[int, int, int]]:
    """(id, prompt row, position) of everything that the token with tree index `i` sees, in order of position."""
    mask = tree.mask()
    seen = mask.visible()[i].nonzero().squeeze(1).tolist()
    prefix = [(t, -1, unit.start_position + n) for unit in tree.units for n, t in enumerate(unit.ids)]
    own = list(zip(tree.ids.tolist(), tree.prompt_rows.tolist(), tree.positions.tolist(), strict=True))
    return sorted(((prefix + own)[j] for j in seen), key=lambda token: token[2])


@settings(deadline=None, max_examples=200)
@given(batch=sequences(), share=st.booleans(), keep=st.booleans())
def test_every_target_sees_exactly_its_sequence(batch: list[Sequence], share: bool, keep: bool) -> None:
    tree = build_tree(batch, share=share, keep=keep)
    found: dict[int, list[tuple[int, list]]] = {b: [] for b in range(len(batch))}
    for slot, target, b in zip(
        tree.target_slot.tolist(), tree.target_ids.tolist(), tree.target_example.tolist(), strict=True
    ):
        found[b].append((target, path_of(tree, int(tree.predicting[slot]))))
    for b, sequence in enumerate(batch):
        wanted = [t for t, is_target in enumerate(sequence.target_mask) if is_target]
        whole = [(i, r, n) for n, (i, r) in enumerate(zip(sequence.ids, sequence.prompt_rows, strict=True))]
        assert found[b] == [(sequence.ids[t], whole[:t]) for t in wanted]
    assert float(tree.target_weights.sum()) == pytest.approx(1.0)
    assert tree.num_prefix == 0 or keep


@settings(deadline=None, max_examples=100)
@given(batch=sequences())
def test_sharing_packs_every_distinct_prefix_once(batch: list[Sequence]) -> None:
    tree = build_tree(batch, keep=False)
    prefixes = set()
    for s in batch:
        last = max(t for t, is_target in enumerate(s.target_mask) if is_target)
        whole = tuple(zip(s.ids, s.prompt_rows, strict=True))
        prefixes |= {whole[: n + 1] for n in range(last)}
    assert tree.num_tokens == len(prefixes)
    assert build_tree(batch, share=False, keep=False).num_tokens == sum(
        max(t for t, m in enumerate(s.target_mask) if m) for s in batch
    )


@settings(deadline=None, max_examples=100)
@given(batch=sequences(), size=st.integers(1, 9), window=st.integers(1, 6))
def test_blocks_cover_the_mask(batch: list[Sequence], size: int, window: int) -> None:
    for mask in (build_tree(batch).mask(), build_tree(batch).mask(window)):
        rows = torch.arange(0, len(mask.query_index), 2)
        for chosen in (mask, mask.select_queries(rows), mask.select_keys(torch.arange(0, len(mask.key_begin), 3))):
            dense = torch.zeros(len(chosen.query_index), len(chosen.key_begin), dtype=torch.bool)
            for block in blocks(chosen, size):
                part = torch.ones(len(dense[block.queries]), block.num_keys, dtype=torch.bool)
                if block.hidden is not None:
                    part &= ~block.hidden
                dense[block.queries, block.keys] = part
            assert torch.equal(dense, chosen.visible())


def test_window_counts_positions_not_packed_indices() -> None:
    left = Sequence([1, 2, 3, 4], [0, -1, -1, -1], [False, False, False, True], 0)
    right = Sequence([1, 5, 6, 7], [0, -1, -1, -1], [False, False, False, True], 0)
    tree = build_tree([left, right])
    assert tree.ids.tolist() == [1, 2, 3, 5, 6]
    assert tree.mask(2).visible().int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_weights_are_means_of_means() -> None:
    short = Sequence([1, 2], [0, -1], [False, True], 0)
    long = Sequence([1, 3, 4], [0, -1, -1], [False, True, True], 0)
    tree = build_tree([short, long], [3.0, 1.0])
    weights = dict(zip(tree.target_ids.tolist(), tree.target_weights.tolist(), strict=True))
    assert weights == {2: 0.75, 3: 0.125, 4: 0.125}


def test_branches_stand_behind_their_shared_beginning() -> None:
    left = Sequence([1, 2, 3], [0, -1, -1], [False] * 3, 0)
    right = Sequence([1, 2, 5, 6], [0, -1, -1, -1], [False] * 4, 0)
    tree = pack_branches([left, right], 2)
    assert tree.units[0].ids == (1, 2)
    assert tree.leaves.tolist() == [0, 2]
    assert tree.mask().visible().int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
