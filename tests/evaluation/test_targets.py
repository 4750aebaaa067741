"""Targets that could never be right are refused with their place, and both texts, before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.data.example import Example
from embedgrad.data.readers import read_jsonl
from embedgrad.evaluation.grading.registry import make_grader
from embedgrad.evaluation.targets import check_targets, short
from embedgrad.util.errors import DataError

MATH_TARGET = "He has 20+25=<<20+25=45>>45 pens.\n#### 45"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (MATH_TARGET, True), ("#### 45", True), ("#### 44", False), ("so\n#### 45 pens", True), ("45", True),
        ("$45$.", True), ("答案是45", True), ("答案是：45。", True), ("答えは45です", True), ("정답은 45입니다", True),
        ("La respuesta es 45.", True), ("Ответ: 45", True), ("So the answer is 45 pens.", True), ("45.0", True),
        ("The answer is $45.", True), ("答案是44", False), ("#### Step 2\nso 3", False), ("he has 45 of them", False),
    ],
)  # fmt: skip
def test_answers_to_a_target_with_hashes(text: str, right: bool) -> None:
    pytest.importorskip("math_verify")
    assert make_grader("math").grade(text, MATH_TARGET).correct == right


@settings(deadline=None, max_examples=40)
@given(
    st.integers(-10_000, 10_000_000),
    st.sampled_from(["#### {}", "So.\n#### {}", "\\boxed{{{}}}", "{}", "答案是{}", "The answer is {}.", "답: {}"]),
    st.sampled_from(["{}", "{:,}", "{}.0", "${}$"]),
)
def test_a_number_is_read_in_every_form(number: int, form: str, digits: str) -> None:
    pytest.importorskip("math_verify")
    grader, text = make_grader("math"), form.format(digits.format(number))
    assert grader.grade(grader.ideal(text), text).correct
    assert grader.grade(text, f"thus\n#### {number}").correct
    assert not grader.grade(text, f"thus\n#### {number + 1}").correct


@pytest.mark.parametrize(
    ("grader", "labels", "target", "said"),
    [
        ("exact", ["good", "bad"], "yes", r"line 2 has the target 'yes', which is not one of good, bad\."),
        ("exact", ["good", "yes"], " Yes", "not one of good, yes; the label is written 'yes'"),
        ("math", None, "He said that it was about a dozen", "the grader 'math' does not find .* it reads no answer in"),
        ({"kind": "label", "pattern": r"<(\w+)>"}, None, "yes", "the grader 'label' .*'yes' .* reads no answer"),
        ({"kind": "label", "pattern": r"\w+"}, ["no", "yes no"], "yes no", "the grader 'label' .* 'yes no'"),
    ],
)
def test_a_target_that_cannot_be_right_is_refused_with_its_place(
    tmp_path: Path, grader: object, labels: list[str] | None, target: str, said: str
) -> None:
    path = tmp_path / "d.jsonl"
    first = "5" if grader == "math" else "good" if labels and "good" in labels else "no" if labels else "<no>"
    path.write_text("".join(json.dumps({"query": "q", "target": t}) + "\n" for t in (first, target)))
    with pytest.raises(DataError, match=said) as raised:
        check_targets(read_jsonl(path), "example", labels, make_grader(grader, labels))  # type: ignore[arg-type]
    assert str(raised.value).startswith(f"{path}, line 2")


def test_an_example_without_a_place_is_called_by_its_number() -> None:
    with pytest.raises(DataError, match="training example 2 has the target 'c'"):
        check_targets([Example("q", "a"), Example("q", "c"), Example("q", [1, 2])], "training example", ["a", "b"])
    assert len(short("a" * 200)) < 100
