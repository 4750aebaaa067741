"""How a batch is divided among processes."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.engine.batch_split import split_batch
from embedgrad.engine.tree import PreparedSequence, build_tree


def sequence(tail: list[int], prompt: int = 6) -> PreparedSequence:
    """Two constant tokens, a prompt, and a tail whose last token is the target."""
    ids = [7, 8, *range(prompt), *tail]
    rows = [-1, -1, *range(prompt), *([-1] * len(tail))]
    mask = [False] * (len(ids) - 1) + [True]
    return PreparedSequence(SimpleNamespace(ids=ids, prompt_rows=rows, target_mask=mask, constant_prefix=2))


def tokens(sequences: list[PreparedSequence], part: list[int]) -> int:
    return build_tree([sequences[i] for i in part]).num_tokens if part else 0


TAILS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=40), min_size=1, max_size=24)


@settings(deadline=None, max_examples=60)
@given(TAILS, st.integers(1, 6))
def test_every_sequence_is_in_one_part_and_the_parts_are_even(tails: list[list[int]], parts: int) -> None:
    sequences = [sequence(tail) for tail in tails]
    division = split_batch(sequences, parts)
    assert len(division) == parts
    assert sorted(i for part in division for i in part) == list(range(len(tails)))
    assert all(part == sorted(part) for part in division)
    if parts == 1:
        return
    largest = max(tokens(sequences, part) for part in division)
    whole, longest = tokens(sequences, list(range(len(tails)))), max(tokens(sequences, [i]) for i in range(len(tails)))
    # A run can be cut where it is full: what all have above a fair share is one sequence and the prompt at most.
    common = 6
    assert largest <= (whole - common) / parts + 2 * longest + common


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(20, 40))
def test_siblings_stay_together(families: int, children: int, length: int) -> None:
    """Families of sequences that share a long query, as many as parts: each part gets one family."""
    tails = [[50 + family] * length + [60 + child, 1] for child in range(children) for family in range(families)]
    division = split_batch([sequence(tail) for tail in tails], families)
    assert sorted(tuple(sorted({i % families for i in part})) for part in division) == [(f,) for f in range(families)]


def test_even_lengths_are_divided_evenly() -> None:
    """Lengths that no cut into runs of neighbours divides well."""
    tails = [[i + 10] * length for i, length in enumerate([40, 4, 38, 6, 36, 8, 34, 10])]
    sequences = [sequence(tail) for tail in tails]
    sizes = [tokens(sequences, part) for part in split_batch(sequences, 4)]
    assert max(sizes) - min(sizes) <= 2


def test_no_sequences() -> None:
    assert split_batch([], 3) == [[], [], []]
