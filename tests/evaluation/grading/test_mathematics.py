"""Graders of mathematical answers."""

from __future__ import annotations

import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedgrad.evaluation.grading import mathematics
from embedgrad.evaluation.grading.grader import Grade
from embedgrad.evaluation.grading.mathematics import Boxed, last_boxed, reference, same_text
from embedgrad.evaluation.grading.registry import make_grader
from embedgrad.tasks.source import Source
from embedgrad.util.errors import ConfigError
from tests.tasks.shared import data_folder


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),  # escaped braces are no braces
        (r"\fbox{x}", "x"),
        (r"$\boxed 7$", "7"),
        (r"\boxed{2} and \boxed{3", "2"),  # cut off before its brace
        (r"\boxed{3", None),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        ("42", None),
    ],
)
def test_the_last_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@given(st.text(alphabet="{}\\ab ", max_size=12), st.text(alphabet="boxed{}\\ ", max_size=20))
def test_any_text_has_a_last_box_or_none(inner: str, around: str) -> None:
    found = last_boxed(around + "\\boxed{" + inner + "}")
    assert found is None or found.strip()


def test_text_for_text() -> None:
    assert same_text(r"\left( 3, \dfrac{\pi}{2} \right)", r"(3,\frac{\pi}{2}).")
    assert not same_text("1/2", "0.5")
    assert not same_text(r"\leftarrow", "arrow")
    assert reference(r"Therefore $x = \boxed{5}$.") == "5"
    assert reference(" 5 ") == "5"
    assert Boxed().grade(r"thus \boxed{ 5 }", r"x \boxed{5}") == Grade(True, " 5 ")
    assert Boxed().grade("thus 5", "5") == Grade(False, None)


class TestMathVerify:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("math_verify", reason="math-verify is not installed: pip install embedgrad[math]")

    @pytest.mark.parametrize(
        ("text", "target", "right"),
        [
            (r"\boxed{\frac12}", "0.5", True),
            (r"\boxed{x=5}", "5", True),
            (r"\boxed{(3,\frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", True),
            (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", True),
            (r"\boxed{1,-2}", "-2,1", True),
            (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
            (r"first \boxed{4}, no, \boxed{5}", "4", False),  # the last one counts
            (r"\boxed{5}", "6", False),
            (r"\boxed{[2,5)}", "(2,5)", False),
        ],
    )
    def test_values_are_compared(self, text: str, target: str, right: bool) -> None:
        grade = make_grader("math").grade(text, target)
        assert (grade.correct, grade.answer) == (right, last_boxed(text))

    def test_an_answer_that_is_said_but_not_boxed_counts(self) -> None:
        assert make_grader("math").grade(r"The final answer is $\frac{1}{2}$.", "0.5").correct

    @pytest.mark.parametrize("text", ["3 + 4 = 7, and so 42", r"so far $x = 42$ and", "", r"\boxed{2^{42}"])
    def test_numbers_on_the_way_are_no_answer(self, text: str) -> None:
        assert make_grader("math").grade(text, "42") == Grade(False, None)

    def test_outside_the_main_thread(self) -> None:
        grades: list[Grade] = []
        thread = threading.Thread(target=lambda: grades.append(make_grader("math").grade(r"\boxed{0.5}", "1/2")))
        thread.start()
        thread.join()
        assert grades == [Grade(True, "0.5")]

    def test_every_solution_of_math500_gives_its_own_answer(self) -> None:
        grader = make_grader("math")
        rows = Source(data_folder()).rows("math500/test.jsonl", None)  # type: ignore[arg-type]
        right = [grader.grade(row["solution"], row["answer"]).correct for _, row in rows[:100]]
        pairs = itertools.pairwise(rows[:101])
        wrong = [grader.grade(one["solution"], other["answer"]).correct for (_, one), (_, other) in pairs]
        assert all(right)
        assert sum(wrong) <= 3  # neighbours may have the same answer


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install embedgrad\[math\]; the grader 'boxed'"):
        make_grader("math")
