"""What a set of answers looks like, against figures worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedgrad.evaluation.answers import TOKENS, AnswerStatistics
from embedgrad.evaluation.grading.labels import Exact
from embedgrad.generation.generate import Generation


def statistics(texts: list[str], targets: list[str], ids: list[list[int]], labels: tuple[str, ...]) -> AnswerStatistics:
    answers = [
        Generation(text, tokens, "stop" if len(tokens) < 20 else "length", entropies=[0.5] * len(tokens))
        for text, tokens in zip(texts, ids, strict=True)
    ]
    grader = Exact(labels)
    grades = [grader.grade(text, target) for text, target in zip(texts, targets, strict=True)]
    return AnswerStatistics.of(answers, targets, grades, grader)


def test_labels() -> None:
    found = statistics(
        ["Yes", "yes.", "No", "well"], ["Yes", "No", "Yes", "No"], [[1], [1, 4], [2], [3]], ("Yes", "No")
    )
    assert (found.answers, found.tokens, found.truncated, found.invalid, found.loops) == (4, 1.25, 0, 0.25, 0)
    assert found.token_entropy == 0.5
    assert found.distinct_1 == 4 / 5
    assert found.distinct_2 == 1
    assert (found.long, found.trajectory_entropy, found.windowed_entropy) == (0, None, None)
    # yes, yes, no, well: 1.5 bits of the targets' 1 bit
    assert found.answer_entropy == found.collapse == 1.0
    assert found.to_dict()["collapse"] == 1.0


@pytest.mark.parametrize(("yes", "no"), [(4, 0), (3, 1), (2, 2)])
def test_short_answers_collapse_into_one(yes: int, no: int) -> None:
    """A one-token answer always has trajectory entropy 1; the sign of collapse is that all queries get the same."""
    found = statistics(["Yes"] * yes + ["No"] * no, ["Yes", "No"] * 2, [[1]] * yes + [[2]] * no, ("Yes", "No"))
    shares = [n / 4 for n in (yes, no) if n]
    assert found.collapse == pytest.approx(-sum(p * math.log2(p) for p in shares))


def test_the_same_answer_to_all_is_right_where_all_targets_are_the_same() -> None:
    assert statistics(["Yes"] * 3, ["Yes"] * 3, [[1]] * 3, ("Yes", "No")).collapse == 1.0


def test_long_answers_that_go_round_in_circles() -> None:
    loop = [7] * 100
    late = [*range(200), *[9] * 70]  # the loop at the end is one of 64 tokens and more
    varied = list(range(30))
    found = statistics(["a", "b", "c"], ["x", "y", "z"], [loop, late, varied], ())
    assert (found.long, found.invalid) == (3, None)
    assert found.loops == pytest.approx(2 / 3)
    assert found.truncated == 1
    assert found.windowed_entropy == pytest.approx(1 / 3)
    assert found.trajectory_entropy is not None
    assert found.trajectory_entropy > found.windowed_entropy
    assert found.collapse == found.windowed_entropy


def test_a_few_long_answers_do_not_decide() -> None:
    found = statistics(["a", "b", "c"], ["x", "y", "z"], [[7] * TOKENS, [1], [2]], ())
    assert found.windowed_entropy == 0
    assert found.collapse == found.answer_entropy == pytest.approx(1)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", ""]), st.lists(st.integers(0, 3), max_size=24)), min_size=1))
def test_every_figure_is_a_share(drawn: list[tuple[str, list[int]]]) -> None:
    texts = [text for text, _ in drawn]
    targets = ["ab"[i % 2] for i in range(len(texts))]
    found = statistics(texts, targets, [ids for _, ids in drawn], ("a", "b"))
    for name, value in found.to_dict().items():
        if name not in ("answers", "tokens", "long") and value is not None:
            assert 0 <= value <= 1 + 1e-12
