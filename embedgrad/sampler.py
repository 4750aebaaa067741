"""The reference of the compiled samplers: the same token as `csrc/cpu/sampler.cpp` and `csrc/cuda/sampler.cu` choose.

`csrc/common/sampling.h` says what is computed, and why in integers: a sum of integers does not depend on its order, so
that three implementations which add in three orders choose the same token. Here everything is sorted and summed
plainly. Of tied logits at the end of top_k the lowest ids are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embedgrad.errors import ConfigError
from embedgrad.philox import random_bits
from embedgrad.sampling import Sampling

MAX_VOCABULARY = 1 << 18
WEIGHT_BITS = 40

PROBLEMS = {
    1: "the logits hold NaN; the model's weights or its prompt are not usable.",
    2: "the logits hold +inf, which is no distribution; a bias or a penalty may be too large.",
    3: "every token is forbidden: all logits are -inf after bias and penalties.",
}
"""What the compiled samplers' statuses mean (SamplingStatus in csrc/common/sampling.h)."""

# 2^g on [0, 1] in units of 2^-31, from the highest power down; exactly 1 and 2 at the ends.
_EXP2 = (46187, 308230, 2882342, 20646143, 119196239, 515882262, 1488522245, 2147483648)
_LOG2_E = 193635251  # units of 2^-27


@dataclass(frozen=True)
class Penalties:
    """What is taken from the logits of tokens already seen (those of the prompt's anchor count as seen).

    repetition: a positive logit is divided by it, a negative one multiplied (1: off). presence is subtracted once, and
    frequency for each time the token was seen (0: off).
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    @classmethod
    def of(cls, sampling: Sampling) -> Penalties:
        """Those of the settings."""
        return cls(sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)

    def __post_init__(self) -> None:
        """Raises ConfigError where a number is not finite, or repetition is not above 0."""
        for name in ("repetition", "presence", "frequency"):
            if not np.isfinite(np.float32(getattr(self, name))):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but must be a finite number.")
        if np.float32(self.repetition) <= 0:
            raise ConfigError(f"repetition is {self.repetition!r}, but must be above 0 (1: off).")


def weights(distances: np.ndarray) -> np.ndarray:
    """exp(-d) of float32 `distances` [n], all at least 0, in units of 2^-40, rounded down: uint64 [n]."""
    near = distances < 32
    t = (np.where(near, distances, 0) * np.float32(1 << 31)).astype(np.uint64) * np.uint64(_LOG2_E)
    g = np.uint64(1 << 32) - (t >> np.uint64(26) & np.uint64(0xFFFFFFFF))
    p = np.zeros_like(g)
    for coefficient in _EXP2:
        p = (p * g >> np.uint64(32)) + np.uint64(coefficient)
    return np.where(near, (p << np.uint64(WEIGHT_BITS - 32)) >> (t >> np.uint64(58)), np.uint64(0))


def adjusted(
    logits: np.ndarray,
    penalties: Penalties | None = None,
    counts: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """`logits` [V] after penalties on tokens with `counts` [V] above 0, and after adding `bias` [V]; all float32."""
    x = logits.astype(np.float64)  # in which the products below are exact
    with np.errstate(over="ignore", invalid="ignore"):
        if counts is not None and penalties is not None:
            repetition, presence, frequency = (
                float(np.float32(p)) for p in (penalties.repetition, penalties.presence, penalties.frequency)
            )
            penalised = np.where(x > 0, x / repetition, x * repetition) - presence - counts * frequency
            x = np.where(counts > 0, penalised, x)
        if bias is not None:
            x = x + bias.astype(np.float32)
        return x.astype(np.float32)


def choose_token(
    logits: np.ndarray,
    sampling: Sampling,
    *,
    stream: int = 0,
    step: int = 0,
    penalties: Penalties | None = None,
    counts: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    candidates: Sequence[int] | None = None,
) -> int:
    """The next token after `logits` [V] float32.

    The random number is that of (sampling.seed, `stream`, `step`). `counts` [V] int: how often each token was seen.
    `bias` [V] is added to the logits; -inf forbids a token. `candidates`: a forced choice among these token ids, each
    once, ascending. Raises ConfigError where a candidate's value is NaN or +inf, or where every one is -inf.
    """
    if logits.ndim != 1 or not 1 <= len(logits) <= MAX_VOCABULARY or logits.dtype != np.float32:
        raise ConfigError(f"a row of logits must be float32 [V] with V from 1 to {MAX_VOCABULARY}.")
    ids = np.arange(len(logits)) if candidates is None else np.asarray(candidates, dtype=np.int64)
    if not len(ids):
        raise ConfigError("a forced choice that is complete leaves no token to choose.")
    x = adjusted(logits, penalties, counts, bias)[ids]
    _check(x)
    if sampling.temperature == 0:
        return int(ids[x.argmax()])  # the first of equal ones, and ids ascend
    order = np.lexsort((ids, -x))
    with np.errstate(over="ignore"):
        w = weights((x.max() - x) / np.float32(sampling.temperature))
    if sampling.top_k:
        order = order[: sampling.top_k]
    if sampling.top_p < 1:
        running = np.cumsum(w[order])
        part = int(sampling.top_p * 2**32)
        need = max(-(-int(running[-1]) * part // 2**32), 1)
        order = order[: int(np.searchsorted(running, np.uint64(need))) + 1]
    least = max(math.ceil(sampling.min_p * 2**WEIGHT_BITS), 1)
    kept = np.sort(order[w[order] >= np.uint64(least)])
    running = np.cumsum(w[kept])
    target = (random_bits(sampling.seed, stream, step) * int(running[-1]) >> 64) + 1
    return int(ids[kept[np.searchsorted(running, np.uint64(target))]])


def _check(x: np.ndarray) -> None:
    problem = 1 if np.isnan(x).any() else 2 if x.max() == np.inf else 3 if x.max() == -np.inf else 0
    if problem:
        raise ConfigError(PROBLEMS[problem])
