"""Graders of short answers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedgrad.evaluation.grading.grader import Grade
from embedgrad.evaluation.grading.labels import Exact, GeneratedLabel, same_answer
from embedgrad.evaluation.grading.registry import make_grader
from embedgrad.util.errors import ConfigError

LABELS = ("Yes", "No", "Not sure")


@pytest.mark.parametrize("text", ["yes", " Yes.", "YES\n", "Yes"])
def test_exact_forgives_case_space_and_a_full_stop(text: str) -> None:
    assert Exact(LABELS).grade(text, "Yes") == Grade(True, "Yes")
    assert Exact().grade(text, "Yes") == Grade(True, text.strip())


def test_exact_knows_invalid_answers_where_it_knows_the_labels() -> None:
    assert Exact(LABELS).grade("Yes, it did", "Yes") == Grade(False, None)
    assert Exact(LABELS).grade("no", "Yes") == Grade(False, "No")
    assert Exact().grade("Yes, it did", "Yes") == Grade(False, "Yes, it did")
    assert (Exact(LABELS).sees_invalid, Exact().sees_invalid, Exact.forced) == (True, False, True)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("I would say yes, not no.", "yes"),
        ("not sure", "not sure"),  # the longer label, although "No" begins alike
        ("Nothing known, eyes open", None),  # labels are words of their own
        ("", None),
        ("**Yes**", "Yes"),
    ],
)
def test_a_label_is_found_in_the_text(text: str, answer: str | None) -> None:
    assert GeneratedLabel(LABELS).grade(text, "Yes") == Grade(answer is not None and same_answer(answer, "yes"), answer)


def test_patterns_groups_and_the_last_match() -> None:
    last = GeneratedLabel(LABELS, which="last")
    assert last.grade("yes ... so: No.", "No") == Grade(True, "No")
    behind = GeneratedLabel(LABELS, pattern=r"answer:\s*(\w+)")
    assert behind.grade("no; ANSWER: yes", "Yes") == Grade(True, "yes")
    assert behind.grade("answer: maybe", "Yes") == Grade(False, None)  # none of the labels
    assert behind.grade("yes", "Yes") == Grade(False, None)
    assert GeneratedLabel(pattern=r"\d+").grade("it is 42 or 43", "42") == Grade(True, "42")
    assert not GeneratedLabel.forced  # a validation must generate


@given(st.text(max_size=30), st.sampled_from(LABELS))
def test_any_text_has_a_grade(text: str, target: str) -> None:
    for grader in (Exact(LABELS), Exact(), GeneratedLabel(LABELS), GeneratedLabel(LABELS, pattern="(x)?")):
        grade = grader.grade(text, target)
        assert not (grade.correct and grade.answer is None)


@pytest.mark.parametrize(
    "values", ["exact", "boxed", {"kind": "label", "which": "last"}, {"kind": "label", "pattern": "a"}]
)
def test_graders_are_made_from_what_they_describe(values: Any) -> None:
    grader = make_grader(values, LABELS)
    assert make_grader(grader.describe(), LABELS) == grader


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("exactly", "the grader is 'exactly', but must be one of exact, label, math, boxed"),
        ({}, "the grader is None"),
        ({"kind": "label", "patern": "x"}, "no setting 'patern'; did you mean 'pattern'"),
        ({"kind": "exact", "x": 1}, "the grader 'exact' has no setting 'x'; it has none"),
        ({"kind": "label", "pattern": "("}, "which is no regular expression"),
        ({"kind": "label", "pattern": 3}, "pattern is 3"),
        ({"kind": "label", "which": "best"}, "which is 'best', but must be first or last"),
    ],
)
def test_unusable_graders(values: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        make_grader(values, LABELS)


def test_a_label_needs_something_to_look_for() -> None:
    with pytest.raises(ConfigError, match="needs a pattern, or data with labels"):
        make_grader("label")
