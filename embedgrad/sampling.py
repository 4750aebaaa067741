"""How the next token is chosen from the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.errors import ConfigError

LEAST_TEMPERATURE = 1e-6  # logits divided by less could overflow float32


@dataclass(frozen=True)
class Sampling:
    """Settings of generation.

    max_new_tokens: longest answer in tokens. temperature 0 is greedy; otherwise (from 1e-6 on) logits are divided by
    it. top_k (0: off), top_p (1: off) and min_p (0: off) each leave out unlikely tokens, in this order. seed: each
    query draws from its own stream of random numbers, given by the seed and the query's place in the call, so that its
    text does not depend on its neighbours. stop: texts at which an answer ends (they are cut off), besides the model's
    stop tokens.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ConfigError where a number is none, or outside its range."""
        for name in ("max_new_tokens", "top_k", "seed"):
            self._require(_is_a(getattr(self, name), int), name, "a whole number")
        for name in ("temperature", "top_p", "min_p"):
            self._require(_is_a(getattr(self, name), int, float), name, "a number")
        self._require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        usable = self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf
        self._require(usable, "temperature", f"0 (the likeliest token), or finite and at least {LEAST_TEMPERATURE}")
        self._require(self.top_k >= 0, "top_k", "at least 0 (0: off)")
        self._require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (1: off)")
        self._require(0 <= self.min_p <= 1, "min_p", "between 0 (off) and 1")
        if not isinstance(self.stop, (list, tuple)) or not all(isinstance(s, str) and s for s in self.stop):
            raise ConfigError("stop must be a sequence of texts that are not empty.")

    def _require(self, holds: bool, name: str, right: str) -> None:
        if not holds:
            raise ConfigError(f"{name} is {getattr(self, name)!r}, but must be {right}.")

    def generator(self, index: int) -> torch.Generator:
        """The stream of random numbers of the query at place `index`."""
        return torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + index) % (1 << 63))


def _is_a(value: object, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """One token per row of `logits` [B, V] (any float type), row b with `generators[b]`."""
    if sampling.temperature == 0:
        return logits.argmax(dim=1).tolist()
    p = filtered_probabilities(logits, sampling).cpu()
    return [int(torch.multinomial(row, 1, generator=g)) for row, g in zip(p, generators, strict=True)]


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [B, V] that is drawn from, float32: temperature, then top-k, top-p, min-p."""
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
