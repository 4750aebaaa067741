"""Splits and folds: no text is in two parts, and its part depends on the seed, not on the order of the examples."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedgrad.data.example import Example
from embedgrad.data.leakage import check_leakage
from embedgrad.data.splitting import families, folds, split, text_key, without
from embedgrad.util.errors import DataError

TEXT = st.text("ab \t\n漢😀", max_size=4).map("q".__add__)
QUERIES = st.sampled_from(["a", "b", " a", "a  b", "a\tb ", "c"]) | TEXT
EXAMPLE = st.builds(Example, QUERIES | st.lists(st.integers(0, 3), min_size=1, max_size=2), TEXT)
EXAMPLES = st.lists(EXAMPLE, min_size=1, max_size=30)


def key(example: Example) -> str:
    return text_key(example.query)


@given(EXAMPLES, st.tuples(st.integers(0, 12), st.integers(0, 12)), st.integers(0, 5), st.randoms())
def test_equal_queries_never_sit_on_two_sides(
    examples: list[Example], sizes: tuple[int, int], seed: int, random
) -> None:  # type: ignore[no-untyped-def]
    wanted = {"train": sizes[0], "test": sizes[1]}
    try:
        parts = split(examples, wanted, seed)
    except DataError:
        groups = {key(example) for example in examples}
        assert sum(sizes) > len(examples) or len(groups) < len(examples)
        return
    assert [list(parts), all(len(parts[name]) <= count for name, count in wanted.items())] == [list(wanted), True]
    train, test = ({key(example) for example in part} for part in parts.values())
    assert not train & test
    if len({key(example) for example in examples}) == len(examples):
        assert {name: len(part) for name, part in parts.items()} == wanted
        shuffled = random.sample(examples, len(examples))
        assert split(shuffled, wanted, seed) == parts


@pytest.mark.parametrize("seed", range(8))
def test_queries_that_differ_in_white_space_only_are_one(seed: int) -> None:
    examples = [Example(query, "x") for number in range(20) for query in (f"a {number}", f" a\t{number}\n")]
    parts = split(examples, {"train": 0.5, "test": 0.5}, seed)
    assert all(len(part) == 2 * len({key(example) for example in part}) == 20 for part in parts.values())


@given(EXAMPLES, st.integers(0, 5))
def test_fractions_that_add_up_share_out_everything(examples: list[Example], seed: int) -> None:
    parts = split(examples, {"train": 0.7, "validation": 0.0, "test": 0.3}, seed) if len(examples) > 20 else None
    if parts is None:
        parts = split(examples, {"train": 1.0}, seed)
    assert sorted(map(repr, examples)) == sorted(repr(example) for part in parts.values() for example in part)


def test_a_split_depends_on_the_seed_and_on_nothing_else() -> None:
    examples = [Example(f"query {number}", "x") for number in range(100)]
    one = split(examples, {"train": 60, "test": 0.2}, seed=1)
    assert one == split(examples, {"train": 60, "test": 0.2}, seed=1)
    assert one != split(examples, {"train": 60, "test": 0.2}, seed=2)
    assert [len(part) for part in one.values()] == [60, 20]
    assert one["train"][0].query == "query 70"  # pinned: another order would move examples between old runs' parts


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"train": 6, "test": 5}, "a split into train 6, test 5 needs more than the 10 examples there are"),
        ({"train": 0.6, "test": 0.5}, "needs more than"),
        ({"train": 1.5}, "fraction of the part 'train' must lie between 0 and 1"),
        ({"train": -1}, "must be a number of examples or a fraction"),
        ({"train": math.nan}, "must be a number of examples or a fraction"),
        ({"train": True}, "must be a number of examples or a fraction"),
        ({"train": "all"}, "must be a number of examples or a fraction"),
        ({}, "at least one part"),
    ],
)
def test_split_refusals(sizes: dict[str, float], said: str) -> None:
    with pytest.raises(DataError, match=said):
        split([Example(str(number), "x") for number in range(10)], sizes)


def test_a_part_that_stays_empty_is_refused() -> None:
    with pytest.raises(DataError, match="the part 'train' of 2 examples stays empty"):
        split([Example("same", "x")] * 5, {"train": 2})


def test_texts_with_the_same_words_are_one() -> None:
    same = ["The  CEO's plan, really?", "the ceo s PLAN\nreally", "“The CEO’s plan” – really!"]
    assert len({text_key(text) for text in same}) == 1
    assert text_key("2 + 3") != text_key("2 - 3")
    assert text_key("?!") != text_key("!?")  # without words every character counts
    assert text_key([1, 2]) != text_key([12])


@given(EXAMPLES, st.integers(2, 5), st.integers(0, 3), st.randoms())
def test_folds_share_out_everything_and_no_text(examples: list[Example], count: int, seed: int, random) -> None:  # type: ignore[no-untyped-def]
    keys = {key(example) for example in examples}
    if len(keys) < count:
        with pytest.raises(DataError, match=f"{len(keys)} different texts cannot be divided into {count} folds"):
            folds(examples, count, seed)
        return
    parts = folds(examples, count, seed)
    assert sorted(map(repr, examples)) == sorted(repr(example) for part in parts for example in part)
    held = [{key(example) for example in part} for part in parts]
    assert sum(map(len, held)) == len(keys)
    if len(keys) == len(examples):
        assert folds(random.sample(examples, len(examples)), count, seed) == parts


def test_folds_are_balanced_in_size_and_targets() -> None:
    examples = [Example(f"story {number}", "Yes" if number % 10 < 6 else "No") for number in range(100)]
    for part in folds(examples, 5, seed=3):
        assert (len(part), sum(example.target == "Yes" for example in part)) == (20, 12)
    with pytest.raises(DataError, match="at least 2 folds"):
        folds(examples, 1)


def stories() -> list[Example]:
    """Twelve stories, each with a word changed and another label, and twice with another question."""
    made = []
    for number in range(12):
        base = (
            f"The person {number} went up the hill of sand {number} and saw the river far below the old town {number}"
        )
        made += [Example(f"{base}. Did {who} cause it?", label) for who, label in (("she", "Yes"), ("the rain", "No"))]
        made.append(Example(base.replace("river", "forest") + ". Did she cause it?", "No"))
    return made


def test_families_are_variations_and_stay_together() -> None:
    examples = stories()
    group = families(examples)
    assert len({group(example) for example in examples}) == 12
    assert group(Example(examples[0].query, "whatever")) == group(examples[1]) == group(examples[2])
    parts = split(examples, {"train": 18, "test": 18}, seed=1, group=group)
    assert not {group(e) for e in parts["train"]} & {group(e) for e in parts["test"]}
    found = check_leakage(parts, group)
    assert found.clean
    assert found.similar == {"test": 0}
    loose = check_leakage(split(examples, {"train": 18, "test": 18}, seed=1))
    assert loose.clean  # no text is on two sides,
    assert loose.similar["test"] >= 5  # but many are there but for a word


@given(st.lists(TEXT, min_size=1, max_size=12))
def test_short_texts_are_families_of_their_own(texts: list[str]) -> None:
    examples = [Example(text, "x") for text in texts]
    assert len({families(examples)(example) for example in examples}) == len({text_key(text) for text in texts})


def test_leakage_is_found_counted_and_said() -> None:
    long = "one two three four five six seven eight nine ten"
    train = [Example("A b", "x"), Example(long + " eleven twelve", "x")]
    test = [Example("a, B!", "y"), Example("c", "x"), Example(long, "x")]
    found = check_leakage({"train": train, "validation": [], "test": test}, left_out=2, dropped=1)
    assert not found.clean
    assert found.shared == {"train/test": 1}
    assert found.similar == {"test": 1}
    assert found.sentence() == (
        "leakage check (train 2, validation 0, test 3): LEAK, 1 of test in train; nearly the same (70% of the 8-word "
        "sequences): 1 of test; 2 left out of training because the test data has the same words; 1 not usable"
    )
    rest = without(train, test)
    assert rest == train[1:]
    assert check_leakage({"train": rest, "test": test[:2]}).clean
    assert found.to_dict()["clean"] is False
