"""How much choice a model had, and how much a text repeats itself.

The definitions are our own: EmbedGrad names an entropy, and gives no formula. These are the plain reference; the C++
and CUDA implementations in `csrc/` are held to them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from embedgrad.errors import ConfigError


def token_entropy(logits: Tensor) -> Tensor:
    """The entropy of each next-token distribution as a share of the largest possible one (our definition).

    `logits` [..., V], any float type; -inf is probability 0. Returns [...], float32 (float64 from float64), without
    unit: H(softmax(logits)) / log V, from 0 (one token is certain) to 1 (all are equally likely); 0 where V is 1.
    Raises ConfigError where a row has NaN or +inf, or nothing but -inf: it is no distribution.
    """
    if logits.ndim == 0 or not logits.shape[-1] or not logits.is_floating_point():
        raise ConfigError("token_entropy takes logits of a float type, [..., V] with V of at least 1.")
    x = logits if logits.dtype == torch.float64 else logits.float()
    highest = x.amax(dim=-1)
    if not bool(torch.isfinite(highest).all()):
        raise ConfigError("token_entropy takes rows of logits without NaN or +inf, and not all of them -inf.")
    log_p = x.log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)).sum(dim=-1)
    return (entropy / math.log(max(x.shape[-1], 2))).clamp(0, 1)


def trajectory_entropy(ids: Sequence[int], n: int = 3, window: int | None = None) -> float:
    """How varied a text is: the entropy of its n-grams as a share of the largest that their number allows (our
    definition).

    `ids`: token ids. With N = len(ids) - n + 1 n-grams, of which the different ones occur c times each: the Shannon
    entropy -Σ (c/N) log (c/N), divided by log N. 1 where no n-gram repeats, 0 for a loop of one token; without unit.
    Fewer than two n-grams (also no ids at all) repeat nothing: 1.

    `window`: the least value over all stretches of this many tokens, so that a late loop is seen however long the text
    before it is; a text that is no longer is taken whole.

    Raises ConfigError where n is below 1, or where a window does not hold two n-grams.
    """
    if n < 1:
        raise ConfigError(f"n is {n}, but an n-gram has at least 1 token.")
    if window is not None and window < n + 1:
        raise ConfigError(f"window is {window}, but must be at least n + 1 = {n + 1} to hold two n-grams.")
    if window is None or len(ids) <= window:
        return _gram_entropy(ids, n)
    return min(_gram_entropy(ids[start : start + window], n) for start in range(len(ids) - window + 1))


def _gram_entropy(ids: Sequence[int], n: int) -> float:
    total = len(ids) - n + 1
    if total < 2:
        return 1.0
    counts = Counter(tuple(ids[i : i + n]) for i in range(total)).values()
    repeated = sum(c * math.log(c) for c in counts)  # -Σ (c/N) log (c/N) = log N - (Σ c log c) / N
    most = total * math.log(total)
    return min(max((most - repeated) / most, 0.0), 1.0)


def loop_period(ids: Sequence[int], repeats: int = 3) -> int:
    """The shortest period, in tokens, with which a text ends (our definition); 0 where it ends in no loop.

    The last `repeats` · period of `ids` must repeat with this period; `repeats` is at least 2. The result is at most
    len(ids) // repeats. Raises ConfigError where `repeats` is below 2: once is no repetition.
    """
    if repeats < 2:
        raise ConfigError(f"repeats is {repeats}, but a loop is seen at least 2 times.")
    end = len(ids)
    for period in range(1, end // repeats + 1):
        if all(ids[i] == ids[i - period] for i in range(end - 1, end - 1 - period * (repeats - 1), -1)):
            return period
    return 0
