"""Entropies and loops: plain definitions and Python; token entropy also in C++ and CUDA."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.generation.entropy import loop_period, token_entropy, trajectory_entropy
from embedgrad.util.errors import ConfigError
from tests.csrc.core import Core

DEVICES = ("cpu", "cuda")


def definition(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """H(p) / log V [B] and log p [B, V] in float64, as written down."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    terms = np.where(p > 0, p * np.where(p > 0, log_p, 0), 0)
    return -terms.sum(axis=1) / math.log(logits.shape[1]), log_p


@pytest.mark.parametrize("device", ["python", *DEVICES])
@pytest.mark.parametrize("vocabulary", [2, 33, 1000, 4097, 49152])
@pytest.mark.parametrize("scale", [0.0, 1.0, 12.0])
def test_token_entropy_is_its_definition(core: Core, device: str, vocabulary: int, scale: float) -> None:
    random = np.random.default_rng(vocabulary)
    logits = (scale * random.normal(0, 1, (2, vocabulary)) + 7).astype(np.float32)
    logits[1, 0] = -np.inf
    expected, log_p = definition(logits)
    tokens = random.integers(1, vocabulary, 2).astype(np.int32)
    if device == "python":
        entropy = token_entropy(torch.tensor(logits)).numpy()
    else:
        entropy, chosen = core.token_entropy(device, logits, tokens)
        np.testing.assert_allclose(chosen, log_p[[0, 1], tokens], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(entropy, expected, rtol=2e-6, atol=2e-6)


NUMBERS = st.one_of(st.sampled_from([0.0, -np.inf, 3e38, -3e38, 1e-45]), st.floats(-50, 50, width=32))


@settings(max_examples=100, deadline=None)
@given(st.lists(NUMBERS, min_size=2, max_size=200).filter(lambda x: max(x) > -np.inf))
def test_token_entropy_of_extreme_logits(core: Core, row: list[float]) -> None:
    logits = np.array([row], np.float32)
    expected, _ = definition(logits)
    assert token_entropy(torch.tensor(logits, dtype=torch.float64)).item() == pytest.approx(expected[0], abs=1e-9)
    for device in DEVICES:
        entropy, log_p = core.token_entropy(device, logits)
        assert entropy[0] == pytest.approx(expected[0], abs=1e-6)
        assert np.isnan(log_p[0])  # no token was asked for


def test_token_entropy_at_its_ends(core: Core) -> None:
    logits = np.full((3, 50), -np.inf, np.float32)
    logits[0] = 4
    logits[1, 7] = -2
    logits[2, :2] = 1
    expected = [1, 0, math.log(2) / math.log(50)]
    assert token_entropy(torch.tensor(logits)).tolist() == pytest.approx(expected, abs=1e-6)
    assert token_entropy(torch.zeros(2, 3, 1)).tolist() == [[0] * 3] * 2
    for device in DEVICES:
        assert core.token_entropy(device, logits)[0].tolist() == pytest.approx(expected, abs=1e-6)
        assert core.token_entropy(device, np.ones((1, 1), np.float32))[0].tolist() == [0]


@pytest.mark.parametrize("place", [0, 31, 77])
def test_no_distribution_has_no_entropy(core: Core, place: int) -> None:
    logits = np.zeros((3, 78), np.float32)
    logits[0, place] = np.nan
    logits[1, place] = np.inf
    logits[2] = -np.inf
    for row in logits:
        with pytest.raises(ConfigError, match="NaN or"):
            token_entropy(torch.tensor(row))
    for device in DEVICES:
        entropy, log_p = core.token_entropy(device, logits, np.array([5, 5, 5], np.int32))
        assert np.isnan(entropy).all()
        assert np.isnan(log_p).all()


def test_token_entropy_takes_logits() -> None:
    for wrong in (torch.zeros(3, 0), torch.zeros(3, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(ConfigError, match="logits of a float type"):
            token_entropy(wrong)
    assert token_entropy(torch.zeros(2, 5, dtype=torch.bfloat16)).dtype == torch.float32


def by_hand(ids: list[int], n: int) -> float:
    grams = Counter(zip(*(ids[i:] for i in range(n)), strict=False))
    total = sum(grams.values())
    if total < 2:
        return 1.0
    return -sum(c / total * math.log(c / total) for c in grams.values()) / math.log(total)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 3), max_size=70), n=st.integers(1, 4), extra=st.integers(1, 30))
def test_trajectory_entropy(ids: list[int], n: int, extra: int) -> None:
    window = n + extra
    assert trajectory_entropy(ids, n) == pytest.approx(by_hand(ids, n), abs=1e-12)
    windows = [ids[i : i + window] for i in range(max(1, len(ids) - window + 1))]
    assert trajectory_entropy(ids, n, window) == pytest.approx(min(by_hand(w, n) for w in windows), abs=1e-12)


def test_trajectory_entropy_at_its_ends() -> None:
    rows = [list(range(40)), [3] * 40, [*range(100), *([7, 8] * 10)], [], [1], [1, 1, 1], [1, 1, 1, 1]]
    late = math.log(2) / math.log(8)  # two trigrams in turn, in 10 tokens
    expected = [(1, 1), (0, 0), (trajectory_entropy(rows[2]), late), (1, 1), (1, 1), (1, 1), (0, 0)]
    assert 0.8 < expected[2][0] < 1
    np.testing.assert_allclose([(trajectory_entropy(r), trajectory_entropy(r, window=10)) for r in rows], expected)
    assert trajectory_entropy(rows[1]) == 0


def test_loop_period_is_the_shortest_and_at_the_end() -> None:
    cases = {
        (): 0,
        (1,): 0,
        (1, 1): 0,
        (1, 1, 1): 1,
        (9, 1, 2, 1, 2, 1, 2): 2,
        (1, 2, 1, 2, 1): 0,
        (1, 2, 1, 2, 1, 2, 9): 0,
        (5, 1, 1, 2, 1, 1, 2, 1, 1, 2): 3,
        (0, *[1, 2, 3, 4] * 6): 4,
    }
    assert [loop_period(ids) for ids in cases] == list(cases.values())


def test_settings_that_mean_nothing() -> None:
    with pytest.raises(ConfigError, match="n is 0"):
        trajectory_entropy([1, 2], n=0)
    with pytest.raises(ConfigError, match="at least n \\+ 1 = 4"):
        trajectory_entropy([1, 2], n=3, window=3)
    with pytest.raises(ConfigError, match="repeats is 1"):
        loop_period([1, 2], repeats=1)
