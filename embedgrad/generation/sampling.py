"""Settings of generation. `generation.sampler` implements the choice of the next token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from embedgrad.util.errors import ConfigError

LEAST_TEMPERATURE = 1e-6  # logits divided by less could overflow float32
_LARGEST = 3.4028234e38  # largest float32, the type of penalties and biases


@dataclass(frozen=True)
class Sampling:
    """Settings of generation.

    max_new_tokens: length of the longest answer in tokens.
    temperature: logits are divided by it; 0 is greedy, other values are at least 1e-6.
    top_k (0: off), top_p (1: off), min_p (0: off): each removes unlikely tokens, in this order.
    seed: each query has its own stream of random numbers, which depends on the seed and the query's index in the call.
        So an answer does not depend on the other queries.
    repetition_penalty (1: off): the logit of a token that has occurred is divided by it if positive, else multiplied.
    presence_penalty (0: off): subtracted once from the logit of a token that has occurred.
    frequency_penalty (0: off): subtracted once for each occurrence. All tokens of the sequence count, before the answer
        and in it; for the prompt the ids that its embeddings started from count.
    logit_bias: for a token id the number that is added to its logit; minus infinity forbids the token.
    stop: texts that end an answer, in addition to the model's stop tokens. The stop text is removed.
    choices: the answer is one of these texts, chosen token by token. Empty: any answer.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ConfigError where a value has the wrong type or is outside its range."""
        for name in ("max_new_tokens", "top_k", "seed"):
            self._require(_is_a(getattr(self, name), int), name, "a whole number")
        numbers = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in numbers:
            self._require(_is_a(getattr(self, name), int, float), name, "a number")
        self._require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        usable = self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf
        self._require(usable, "temperature", f"0 (the likeliest token), or finite and at least {LEAST_TEMPERATURE}")
        self._require(self.top_k >= 0, "top_k", "at least 0 (0: off)")
        self._require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (1: off)")
        self._require(0 <= self.min_p <= 1, "min_p", "between 0 (off) and 1")
        self._require(0 <= self.seed < 1 << 64, "seed", "at least 0 and below 2^64")
        self._require(0 < self.repetition_penalty <= _LARGEST, "repetition_penalty", "above 0 (1: off) and finite")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(-_LARGEST <= getattr(self, name) <= _LARGEST, name, "a finite number")
        for name in ("stop", "choices"):
            texts = getattr(self, name)
            if not isinstance(texts, (list, tuple)) or not all(isinstance(s, str) and s for s in texts):
                raise ConfigError(f"{name} must be a sequence of texts that are not empty.")
        self._check_bias()

    def _check_bias(self) -> None:
        right = isinstance(self.logit_bias, Mapping) and all(
            _is_a(token, int) and token >= 0 and _is_a(bias, int, float) and bias <= _LARGEST  # False for NaN
            for token, bias in self.logit_bias.items()
        )
        if not right:
            raise ConfigError(
                "logit_bias must map token ids to numbers, finite or minus infinity (which forbids the token)."
            )

    def _require(self, holds: bool, name: str, right: str) -> None:
        if not holds:
            raise ConfigError(f"{name} is {getattr(self, name)!r}, but must be {right}.")

    @property
    def penalises(self) -> bool:
        """Whether a penalty is on, so that occurrences of tokens must be counted."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def _is_a(value: object, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)
