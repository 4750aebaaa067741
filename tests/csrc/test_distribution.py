"""What is drawn has the distribution that each option defines: chi-square tests.

The seeds are fixed, so a test that passes does so always; the level of 0.001 says how unlikely a failure would be had
they been drawn.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embedgrad.generation.sampler import Penalties
from embedgrad.generation.sampling import Sampling
from tests.csrc.core import Call, Core

DRAWS = {"cpu": 40_000, "cuda": 200}  # the emulation is slow; that it chooses the same tokens has a test of its own
V = 24
LOGITS = np.random.default_rng(3).normal(0, 1.5, V).astype(np.float32)
COUNTS = np.arange(V, dtype=np.int32) % 3
BIAS = np.where(np.arange(V) % 5 == 0, -np.inf, np.linspace(-1, 1, V)).astype(np.float32)


def p_value(observed: np.ndarray, p: np.ndarray) -> float:
    """Of Pearson's chi-square statistic; outcomes expected less than 5 times are one."""
    expected = p * observed.sum()
    assert observed[p == 0].sum() == 0, "a token that the option leaves out was drawn"
    rare = expected < 5
    o, e = np.append(observed[~rare], observed[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    o, e = o[e > 0], e[e > 0]
    statistic = float(((o - e) ** 2 / e).sum())
    freedom = len(o) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2)))


def penalised(penalties: Penalties) -> np.ndarray:
    seen = np.where(LOGITS > 0, LOGITS / penalties.repetition, LOGITS * penalties.repetition)
    return np.where(COUNTS > 0, seen - penalties.presence - COUNTS * penalties.frequency, LOGITS)


OPTIONS = {
    "temperature 1": (Sampling(temperature=1), {}, LOGITS),
    "temperature 0.5": (Sampling(temperature=0.5), {}, LOGITS),
    "temperature 3": (Sampling(temperature=3), {}, LOGITS),
    "top-k": (Sampling(temperature=1, top_k=7), {}, LOGITS),
    "top-p": (Sampling(temperature=1, top_p=0.8), {}, LOGITS),
    "min-p": (Sampling(temperature=1, min_p=0.1), {}, LOGITS),
    "top-k, top-p, min-p": (Sampling(temperature=2, top_k=12, top_p=0.9, min_p=0.2), {}, LOGITS),
    "bias": (Sampling(temperature=1), {"bias": BIAS}, LOGITS + BIAS),
    **{
        name: (Sampling(temperature=1), {"penalties": penalties}, penalised(penalties))
        for name, penalties in {
            "repetition": Penalties(repetition=1.8),
            "presence": Penalties(presence=0.9),
            "frequency": Penalties(frequency=0.6),
        }.items()
    },
}


def draw(core: Core, device: str, sampling: Sampling, options: dict) -> np.ndarray:
    """How often each token was drawn, half of the draws by stream and half by step."""
    rows = DRAWS[device]
    if "penalties" in options:
        options = {**options, "counts": np.broadcast_to(COUNTS, (rows, V))}
    place = np.arange(rows)
    call = Call(np.broadcast_to(LOGITS, (rows, V)).copy(), sampling, place % 200, place // 200, **options)
    tokens, status = core.sample(device, call)
    assert set(status) == {"sampled"}
    return np.bincount(tokens, minlength=V)


@pytest.mark.parametrize("device", list(DRAWS))
@pytest.mark.parametrize("option", OPTIONS)
def test_drawn_as_defined(core: Core, device: str, option: str) -> None:
    sampling, options, logits = OPTIONS[option]
    p = filtered_probabilities(torch.tensor(logits, dtype=torch.float32)[None], sampling)[0].numpy()
    assert p_value(draw(core, device, sampling, options), p) > 0.001


def filtered_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution [B, V] that is drawn from, in plain torch: temperature, then top-k, top-p, min-p."""
    scaled = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        least = scaled.topk(sampling.top_k, dim=1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    p = scaled.softmax(dim=1)
    if sampling.top_p < 1:
        ordered, index = p.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(dim=1) - ordered
        p = p.scatter(1, index, ordered.masked_fill(before >= sampling.top_p, 0))
    if sampling.min_p > 0:
        p = p.masked_fill(p < sampling.min_p * p.amax(dim=1, keepdim=True), 0)
    return p / p.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("option", OPTIONS)
def test_another_distribution_is_told_apart(core: Core, option: str) -> None:
    """The test has the power to fail: what each option draws is not what the plain softmax at 1.3 would."""
    sampling, options, _ = OPTIONS[option]
    p = filtered_probabilities(torch.tensor(LOGITS)[None], Sampling(temperature=1.3))[0].numpy()
    assert p_value(draw(core, "cpu", sampling, options), p) < 1e-6
