"""The reference sampler. It chooses the same tokens as `csrc/cpu/sampler.cpp` and `csrc/cuda/sampler.cu`.

`csrc/common/sampling.h` defines what is computed. Probabilities are integers, because a sum of integers does not depend
on its order: so three implementations that add in different orders choose the same token. This implementation sorts and
sums all tokens. Where equal logits compete for the last places of top_k, the lowest ids win.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embedgrad.generation.sampling import Sampling
from embedgrad.maths.philox import random_bits
from embedgrad.util.errors import ConfigError

MAX_VOCABULARY = 1 << 18
WEIGHT_BITS = 40

PROBLEMS = {
    1: "the logits hold NaN; the model's weights or its prompt are not usable.",
    2: "the logits hold +inf, which is no distribution; a bias or a penalty may be too large.",
    3: "every token is forbidden: all logits are -inf after bias and penalties.",
    4: "a forced choice that is complete leaves no token to choose.",
    5: "the sampler refuses its settings.",
}
"""Message for each status of the compiled samplers (SamplingStatus in csrc/common/sampling.h)."""

# Coefficients of a polynomial for 2^g on [0, 1], in units of 2^-31, highest power first. It is exact at 0 and 1.
_EXP2 = (46187, 308230, 2882342, 20646143, 119196239, 515882262, 1488522245, 2147483648)
_LOG2_E = 193635251  # units of 2^-27


@dataclass(frozen=True)
class Penalties:
    """Penalties on the logits of tokens that have occurred. The token ids of the prompt's anchor count as occurred.

    repetition: a positive logit is divided by it, a negative one multiplied (1: off). presence: subtracted once from
    the logit (0: off). frequency: subtracted once for each occurrence (0: off).
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    @classmethod
    def of(cls, sampling: Sampling) -> Penalties:
        """The penalties in `sampling`."""
        return cls(sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)

    def __post_init__(self) -> None:
        """Raises ConfigError where a number is not finite in float32, or repetition is not positive."""
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
    """`logits` [V] after penalties and bias; all float32.

    counts: [V], how often each token has occurred; penalties apply where it is above 0. bias: [V], added at the end.
    """
    x = logits.astype(np.float64)  # products of two float32 numbers are exact in float64
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
    """The next token for `logits` [V] float32.

    stream, step: choose the random number, together with sampling.seed.
    counts: [V] int, how often each token has occurred. bias: [V], added to the logits; -inf forbids a token.
    candidates: distinct token ids, ascending; the token is one of them. None: all tokens.

    Raises ConfigError where the adjusted logit of a candidate is NaN or +inf, or all of them are -inf.
    """
    if logits.ndim != 1 or not 1 <= len(logits) <= MAX_VOCABULARY or logits.dtype != np.float32:
        raise ConfigError(f"a row of logits must be float32 [V] with V from 1 to {MAX_VOCABULARY}.")
    ids = np.arange(len(logits)) if candidates is None else np.asarray(candidates, dtype=np.int64)
    if not len(ids):
        raise ConfigError("a forced choice that is complete leaves no token to choose.")
    x = adjusted(logits, penalties, counts, bias)[ids]
    _check(x)
    if sampling.temperature == 0:
        return int(ids[x.argmax()])  # of equal logits the lowest id
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
