"""Entropies of next-token distributions and of texts, and a detector of loops.

EmbedGrad names an entropy but gives no formula, so the definitions are our own. This module is the reference for the
C++ and CUDA implementations in `csrc/`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from embedgrad.util.errors import ConfigError


def token_entropy(logits: Tensor) -> Tensor:
    """Normalised entropy of each next-token distribution: H(softmax(logits)) / log V (our definition).

    logits: [..., V] of any float type; -inf is probability 0. Returns [...] in float32 (float64 for float64 logits),
    without unit, from 0 (one token is certain) to 1 (all are equally likely); 0 for V = 1. Raises ConfigError where the
    logits of a distribution hold NaN or +inf, or are all -inf.
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
    """Normalised entropy of a text's n-grams, as a measure of its variety (our definition).

    ids: token ids. Of the N = len(ids) - n + 1 n-grams each distinct one occurs c times. The result is the Shannon
    entropy -Σ (c/N) log (c/N), divided by log N, without unit: 1 if no n-gram repeats, 0 for a loop of one token. With
    fewer than two n-grams it is 1.

    window: take the minimum over all windows of this many tokens, so that a late loop shows however long the text
    before it is. A text that is not longer than the window is taken as a whole.

    Raises ConfigError where n is below 1 or a window does not hold two n-grams.
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
    """The shortest period, in tokens, of a loop at the end of a text (our definition); 0 if there is no loop.

    The last `repeats` · period tokens of `ids` must repeat with this period. The result is at most
    len(ids) // repeats. Raises ConfigError where `repeats` is below 2.
    """
    if repeats < 2:
        raise ConfigError(f"repeats is {repeats}, but a loop is seen at least 2 times.")
    end = len(ids)
    for period in range(1, end // repeats + 1):
        if all(ids[i] == ids[i - period] for i in range(end - 1, end - 1 - period * (repeats - 1), -1)):
            return period
    return 0
