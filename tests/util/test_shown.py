"""What messages and terminals show of files: bounded, and nothing that a terminal obeys."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.util.errors import ConfigError
from embedgrad.util.shown import LONGEST, cut, isolated, one_line, short, visible

VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_any_value_is_one_bounded_line(value: Any) -> None:
    told = short(value)
    assert len(told) <= LONGEST
    assert told == one_line(told)


LARGE = [int("9" * 4000), 1 << 100_000, [1 << 100_000], "x" * 10**7, [["x"] * 10**6] * 10]


@pytest.mark.parametrize("value", LARGE, ids=["digits", "bits", "in a list", "text", "lists"])
def test_large_values_are_told_at_once(value: object) -> None:
    began = time.process_time()
    assert 3 < len(short(value)) <= LONGEST
    assert time.process_time() - began < 0.5


def test_an_aliased_value_is_not_expanded() -> None:
    bomb: list[Any] = ["x"]
    for _ in range(200):
        bomb = [bomb] * 9
    assert len(short(bomb)) <= LONGEST


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_nothing_is_left_that_a_terminal_obeys(text: str) -> None:
    told = visible(text)
    told.encode()
    assert all(sign in "\n\t" or sign.isprintable() or ord(sign) > 0x9F for sign in told)
    assert not set(told) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert visible(told) == told


def test_escapes_are_readable() -> None:
    assert visible("a\x1b[2Jb\u202ec\n") == "a\\x1b[2Jb\\u202ec\n"


@settings(max_examples=100, deadline=None)
@given(st.text(), st.integers(10, 60))
def test_cut(text: str, longest: int) -> None:
    told = cut(text, longest)
    assert len(told) <= longest
    assert told == text or (text.startswith(told.split(" ... ")[0][:3]) and len(text) > longest)


def test_a_message_is_bounded_and_obeys_nothing() -> None:
    told = str(ConfigError("begin \x1b]0;title\x07 " + "x" * 10**6 + "\nend"))
    assert told.startswith("begin \\x1b]0;title\\x07 x")
    assert told.endswith("x end")
    assert len(told) < 2100


@given(st.text(st.sampled_from("ab \u05d0\u0627\u202e\u202b\u2066\u2067\u2068\u2069\u202c\n"), max_size=30))
def test_isolated_text_turns_nothing_around_it(text: str) -> None:
    """Every line has as many openings as ends, none of which ends what was not opened in it."""
    for line in isolated(text).split("\n"):
        depth = 0
        for sign in line:
            depth += sign in "\u2066\u2067\u2068"
            depth -= sign == "\u2069"
            assert depth >= 0
        assert depth == 0
        turning = [i for i, sign in enumerate(line) if sign in "\u05d0\u0627\u202e\u202b\u202c"]
        assert not turning or (line[0], line[-1]) == ("\u2068", "\u2069")


def test_text_from_left_to_right_stays_as_it_is() -> None:
    for text in ("plain", "naïve — 8,1 %", "日本語", "a\nb"):
        assert isolated(text) == text
