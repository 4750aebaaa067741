"""Which texts count as one text, in any script, and which only nearly."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.data.example import Example
from embedgrad.data.leakage import check_leakage
from embedgrad.data.splitting import split, text_key, without
from embedgrad.data.words import words, words_and_signs

OPERATORS = ["+", "-", "*", "/", "^", "<", ">", "=", "×", "÷", "≤", "%"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("8 + 2 =", "8 - 2 ="), ("Sort in C", "Sort in C++"), ("Sort in C", "Sort in C#"), ("x < 4", "x > 4"),
        ("काला", "किला"), ("it is -3", "it is 3"), ("1.5 m", "15 m"), ("1.5", "1 5"), ("5 %", "5"), ("$5", "€5"),
        ("2 * (3 + 4)", "(2 * 3) + 4"), ("5! =", "5 ="), ("great 😀", "great 😡"), ("x^2", "x2"), ("x != y", "x = y"),
        ("ก่า", "ก้า"), ("2**3", "2*3"), ("a && b", "a || b"), ("10-20", "10 20"), ("¬p", "p"), ("$-x$", "$x$"),
    ],
)  # fmt: skip
def test_a_sign_that_carries_meaning_makes_another_text(one: str, other: str) -> None:
    assert text_key(one) != text_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A great film!", "a great  film"), ("well-known, yes", "well known yes"), ("(great) film", "great film"),
        ("great film - really", "great film, really"), ("and/or", "and or"), ("**bold** text", "bold text"),
        ("COVID-19 is", "COVID 19 is"), ("今天天气。很好", "今天 天气，很好"), ("“quoted”", '"quoted"'),
        ("- item one", "item one"), ("Give me 5! Now", "Give me 5. Now"), ("what?!", "what"), ("8−2", "8 - 2"),
        ("cafe\u0301", "CAFÉ"),
    ],
)  # fmt: skip
def test_case_spacing_and_punctuation_make_no_other_text(one: str, other: str) -> None:
    assert text_key(one) == text_key(other)


@settings(deadline=None)
@given(st.integers(2, 99), st.integers(2, 99), st.sampled_from(OPERATORS), st.sampled_from(OPERATORS), st.booleans())
def test_formulas_are_one_text_only_with_one_operator(a: int, b: int, one: str, other: str, spaced: bool) -> None:
    space = " " if spaced else ""
    keys = {text_key(f"{a}{space}{sign}{space}{b} = ?") for sign in (one, other)}
    assert len(keys) == (1 if one == other else 2)


@settings(deadline=None)
@given(st.text())
def test_any_text_has_a_key_that_spaces_around_it_do_not_change(text: str) -> None:
    assert text_key(text) == text_key(f" {text}\n")
    kept = words_and_signs(text)
    assert [word for word in kept if word in words(text)] == words(text) or not text.isascii()


def test_nothing_is_thrown_away_for_a_sign() -> None:
    examples = [Example(f"{a} {o} {b} = ?", "x") for a in range(10, 15) for b in (2, 3, 4) for o in "+-*/"]
    train = [example for number, example in enumerate(examples) if number % 4 != 1]
    test = [example for number, example in enumerate(examples) if number % 4 == 1]
    assert check_leakage({"train": train, "test": test}).clean
    assert len(without(train, test)) == 45
    sizes = {"train": 40, "validation": 5, "test": 10}
    assert {name: len(part) for name, part in split(examples, sizes).items()} == sizes


@pytest.mark.parametrize(
    "text",
    [
        "这家餐厅的菜味道很好服务员也十分热情环境安静适合家庭聚会价格合理下次还会再来",
        "この映画はとても面白かったので友達にも薦めたいと思いますし続編があれば必ず見に行きます",
        "หนังเรื่องนี้สนุกมากฉันอยากแนะนำให้เพื่อนทุกคนไปดูด้วยกันในวันหยุด",
        "이 영화는 정말 재미있어서 친구들에게도 추천하고 싶고 속편이 나오면 꼭 다시 보러 갈 것이다",
        "the film was so good that I would like to tell all of my friends about it again",
    ],
)
def test_one_word_more_is_nearly_the_same_text(text: str) -> None:
    more = text + (" x" if " " in text else text[0])
    other = text[::-1]
    for test, near in ((more, 1), (other, 0)):
        parts = {"train": [Example(text, "a")], "test": [Example(test, "a")]}
        assert check_leakage(parts).similar["test"] == near
