"""Philox4x32-10: the known answers published with Random123 (its file tests/kat_vectors)."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedgrad.maths.philox import philox4x32_10, random_bits
from tests.csrc.core import Core

KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers_python(counter: str, key: str, answer: str) -> None:
    assert philox4x32_10(words(counter), words(key)) == words(answer)  # type: ignore[arg-type]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers_core(core: Core, counter: str, key: str, answer: str) -> None:
    block = (ctypes.c_uint32 * 4)(*words(counter))
    core.lib.embedgrad_philox(block, (ctypes.c_uint32 * 2)(*words(key)))
    assert tuple(block) == words(answer)


U64 = st.integers(0, 2**64 - 1)


@given(U64, U64, st.integers(0, 2**32 - 1))
def test_bits_of_a_stream(core: Core, seed: int, stream: int, step: int) -> None:
    assert core.lib.embedgrad_random_bits(seed, stream, step) == random_bits(seed, stream, step)
