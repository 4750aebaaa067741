"""Labels are found in running text of any script, and a letter is found where it is meant as an answer."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.evaluation.grading.labels import same_answer
from embedgrad.evaluation.grading.registry import make_grader

LETTERS = "ABCDEFGHIJ"


def read(labels: tuple[str, ...], text: str, which: str = "first") -> str | None:
    return make_grader({"kind": "label", "which": which}, labels).grade(text, labels[0]).answer


@pytest.mark.parametrize(
    ("labels", "text", "answer"),
    [
        (("积极", "消极"), "我认为这条评论是积极的", "积极"),
        (("肯定", "否定"), "この文は否定です", "否定"),
        (("บวก", "ลบ"), "ข้อความนี้เป็นลบ", "ลบ"),
        (("긍정", "부정"), "이 글은 부정입니다", "부정"),
        (("合法", "不合法"), "这是不合法的", "不合法"),  # one label inside the other
        (("はい", "いいえ"), "答えはいいえです", "いいえ"),  # は and い meet by chance
        (("ใช่", "ไม่ใช่"), "คำตอบคือไม่ใช่ครับ", "ไม่ใช่"),
        (("ບວກ", "ລົບ"), "ຄວາມເຫັນນີ້ລົບແທ້", "ລົບ"),
        (("हाँ", "नहीं"), "मेरा उत्तर नहीं है", "नहीं"),
        (("का", "कि"), "काला किला", None),  # a vowel sign goes on: another word
        (("да", "нет"), "Ответ: нет, дата неизвестна", "нет"),
        (("نعم", "لا"), "الجواب لا", "لا"),
        (("café", "thé"), unicodedata.normalize("NFD", "un café noir"), "café"),
        (("yes", "no"), "It is nothing but yes", "yes"),
        (("1", "10"), "10 of 100", "10"),
        (("3", "5"), "3.5 or 5", "5"),
        (("C", "C++"), "It is C++ code", "C++"),
        (("👍", "👎"), "I say 👍\ufe0f", "👍"),
    ],
)
def test_labels_in_running_text(labels: tuple[str, ...], text: str, answer: str | None) -> None:
    assert read(labels, text) == answer


@pytest.mark.parametrize(
    ("text", "which", "answer"),
    [
        ("B is right, as a whale is no fish", "last", "B"),
        ("With a closer look: C", "first", "C"),
        ("Now I say D", "first", "D"),
        ("A closer look gives C", "first", "C"),
        ("A is right", "first", "A"),
        ("I'm sure of it: E", "first", "E"),
        ("I", "first", "I"),
        ("(b)", "first", "b"),
        ("the answer is b.", "first", "b"),
        ("Option A or B? The answer is **D**, I think", "last", "D"),
        ("The U.S. says G; F is no A-level", "first", "G"),
        ("答案是B。", "first", "B"),
        ("정답은 H입니다", "first", "H"),
        ("So \\boxed{J}", "first", "J"),
        ("It is a pity that I cannot say", "first", None),
    ],
)
def test_letters(text: str, which: str, answer: str | None) -> None:
    assert read(tuple(LETTERS), text, which) == answer


@settings(deadline=None)
@given(
    st.sampled_from(LETTERS),
    st.sampled_from(
        ["As I see it, {} is right.", "a hard one, but {}", "I would say ({}) fits a bit", "Answer: {}, a"]
    ),
)
def test_the_one_letter_that_is_meant_is_found(letter: str, sentence: str) -> None:
    assert read(tuple(LETTERS), sentence.format(letter)) == letter


@settings(deadline=None)
@given(
    st.sampled_from(["消极", "नहीं", "نہیں", "いいえ", "no", "ոչ", "አይ", "မဟုတ်", "ទេ"]),
    st.sampled_from(list(".。｡．।॥۔։።။។")),
    st.sampled_from(["", " ", "\n"]),
    st.sampled_from(["NFC", "NFD"]),
)
def test_a_final_full_stop_of_any_script_is_forgiven(label: str, stop: str, space: str, form: str) -> None:
    written = unicodedata.normalize(form, f"{space}{label}{space}{stop}{space}")
    assert same_answer(written, label)
    assert not same_answer(f"{label}{stop}{label}", label)
    assert make_grader("exact", (label, "x")).grade(written, label).correct


def test_a_pattern_reads_the_target_as_it_reads_the_answer() -> None:
    grader = make_grader({"kind": "label", "pattern": r"answer: (\w+)"}, ("yes", "no"))
    assert grader.grade("I think the answer: yes", "yes").correct
    assert grader.grade("I think the answer: yes", "Answer: yes").correct
    assert not grader.grade("I think the answer: yes", "Answer: no").correct
