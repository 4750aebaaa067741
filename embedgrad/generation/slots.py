"""The state of the answers that are being written. Every array has one entry per slot.

`csrc/common/advance.h` and `csrc/common/sampling.h` take these arrays. `choose` and `advance` do the same as the
generation loop in csrc/, for every backend.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedgrad.backends import native_core
from embedgrad.generation.constrained import ForcedChoice
from embedgrad.generation.sampler import MAX_VOCABULARY, PROBLEMS, Penalties, choose_token
from embedgrad.generation.sampling import Sampling
from embedgrad.util.errors import ConfigError

RUNNING, STOP, LENGTH, CONTEXT, FAILED, FREE = range(6)  # StopReason in csrc/common/advance.h; FREE: an empty slot
STOP_REASONS = {STOP: "stop", LENGTH: "length", CONTEXT: "context"}


@dataclass(frozen=True)
class Limits:
    """Limits of an answer. stop_ids: tokens that end it. max_position: the model's context length in tokens."""

    stop_ids: frozenset[int]
    max_position: int


class Slots:
    """`size` slots over a vocabulary of V tokens, for answers of at most C = `capacity` tokens.

    ids: [size, C], the answers' tokens.
    entropy, log_probability: [size, C], for each token, also for the stop token, which is not in `ids`.
    lengths: [size], tokens of the answer. steps: [size], tokens that were chosen, including a stop token.
    inputs, positions: [size], the last token and its position in the sequence.
    streams: [size], the query's index. reasons: [size], RUNNING, FREE, or why the answer has ended.
    tokens, status: [size], the token just chosen; 0 or a key of `sampler.PROBLEMS`.
    running: [1], number of running slots.
    counts: [size, V], occurrences of each token, with penalties only.
    nodes: [size], node in the trie of continuations, with a forced choice only.
    """

    def __init__(
        self, size: int, vocabulary: int, sampling: Sampling, limits: Limits, choice: ForcedChoice | None
    ) -> None:
        self.size, self.vocabulary, self.sampling, self.limits, self.choice = size, vocabulary, sampling, limits, choice
        if vocabulary > MAX_VOCABULARY:
            raise ConfigError(f"the vocabulary has {vocabulary} tokens; the samplers take at most {MAX_VOCABULARY}.")
        capacity = min(sampling.max_new_tokens, limits.max_position)
        self.capacity = capacity
        self.ids = np.zeros((size, capacity), np.int32)
        self.entropy = np.zeros((size, capacity), np.float32)
        self.log_probability = np.zeros((size, capacity), np.float32)
        self.lengths, self.inputs, self.positions, self.tokens, self.status = np.zeros((5, size), np.int32)
        self.reasons = np.full(size, FREE, np.int32)
        self.running = np.zeros(1, np.int32)
        self.steps, self.streams = np.zeros(size, np.uint32), np.zeros(size, np.uint64)
        self.counts = np.zeros((size, vocabulary), np.int32) if sampling.penalises else None
        self.nodes = np.zeros(size, np.int32) if choice is not None else None
        self.bias = _bias(sampling, vocabulary)
        self.stop_tokens = np.array(sorted(limits.stop_ids), np.int32)
        self._penalties = Penalties.of(sampling)
        try:
            self._core: ctypes.CDLL | None = native_core.library()
        except ImportError:
            self._core = None

    def enter(self, slot: int, stream: int, ids: Sequence[int]) -> None:
        """Puts a query into a free slot. ids: tokens of its input. stream: its stream of random numbers."""
        self.lengths[slot] = self.steps[slot] = 0
        self.streams[slot], self.positions[slot] = stream, len(ids) - 1
        self.reasons[slot] = RUNNING
        self.running[0] += 1
        if self.counts is not None:
            self.counts[slot] = np.bincount(np.asarray(ids), minlength=self.vocabulary)
        if self.nodes is not None:
            self.nodes[slot] = 0

    def active(self) -> list[int]:
        """The running slots."""
        return np.flatnonzero(self.reasons == RUNNING).tolist()

    def free(self) -> list[int]:
        """The free slots."""
        return np.flatnonzero(self.reasons == FREE).tolist()

    def stop(self, slot: int) -> None:
        """Ends a running answer on the caller's request."""
        self.reasons[slot] = STOP
        self.running[0] -= 1

    def choose(self, logits: np.ndarray, slots: Sequence[int]) -> None:
        """Chooses a token for each of `slots` [n] from `logits` [n, V] float32. Sets `tokens` and `status`."""
        if self._core is None:
            for own_logits, slot in zip(logits, slots, strict=True):
                self.tokens[slot] = choose_token(own_logits, self.sampling, **self._slot_options(slot))
            return
        index = np.asarray(slots)
        arrays = [None if x is None else x[index] for x in (self.streams, self.steps, self.counts, self.nodes)]
        tokens, status = np.empty((2, len(index)), np.int32)
        params, batch = self.params(), self.batch(np.ascontiguousarray(logits), tokens, status, arrays)
        wrong = self._core.embedgrad_sample_cpu(ctypes.byref(params), ctypes.byref(batch))
        if wrong:
            raise ConfigError(f"the sampler refuses its settings (number {wrong}).")
        self.tokens[index], self.status[index] = tokens, status

    def advance(self, slot: int) -> None:
        """Appends the chosen token to the answer, or ends the answer, as `advance_row` in csrc/common/advance.h."""
        if self.status[slot]:
            self._end(slot, FAILED)
            return
        token = int(self.tokens[slot])
        self.steps[slot] += 1
        if token in self.limits.stop_ids:
            self._end(slot, STOP)
            return
        self.ids[slot, self.lengths[slot]] = token
        self.lengths[slot] += 1
        self.inputs[slot] = token
        self.positions[slot] += 1
        complete = False
        if self.counts is not None:
            self.counts[slot, token] += 1
        if self.nodes is not None and self.choice is not None:
            self.nodes[slot] = node = self.choice.follow(int(self.nodes[slot]), token)
            complete = not self.choice.candidates(node)
        if complete:
            self._end(slot, STOP)
        elif self.lengths[slot] >= self.sampling.max_new_tokens:
            self._end(slot, LENGTH)
        elif self.positions[slot] + 1 >= self.limits.max_position:
            self._end(slot, CONTEXT)

    def check(self, slots: Iterable[int]) -> None:
        """Raises ConfigError for a slot of `slots` for which no token could be chosen."""
        for slot in slots:
            if self.reasons[slot] == FAILED:
                raise ConfigError(f"query {self.streams[slot]}: {PROBLEMS[int(self.status[slot])]}")

    def params(self) -> native_core.SamplingParams:
        """The settings in the struct that csrc/ takes."""
        s, penalties = self.sampling, self._penalties
        return native_core.SamplingParams(
            s.temperature, s.top_k, s.top_p, s.min_p, penalties.repetition, penalties.presence, penalties.frequency,
            s.seed,
        )  # fmt: skip

    def batch(
        self, logits: np.ndarray, tokens: np.ndarray, status: np.ndarray, arrays: Sequence[Any], reasons: Any = None
    ) -> native_core.SamplingBatch:
        """The arguments of the sampler in csrc/ for n sequences.

        logits: [n, V]. tokens, status: [n], results. arrays: streams, steps, counts and nodes of these sequences.
        reasons: [n], so that only running sequences are sampled; None: all.
        """
        tree = self.choice
        return native_core.SamplingBatch(
            address(logits), self.vocabulary, len(tokens), self.vocabulary,
            *(address(x) for x in arrays[:3]), address(self.bias), address(arrays[3]),
            address(None if tree is None else tree.children), address(None if tree is None else tree.child_tokens),
            address(reasons), address(tokens), address(status),
        )  # fmt: skip

    def _end(self, slot: int, reason: int) -> None:
        self.reasons[slot] = reason
        self.running[0] -= 1

    def _slot_options(self, slot: int) -> dict[str, Any]:
        node = None if self.nodes is None else int(self.nodes[slot])
        return {
            "stream": int(self.streams[slot]),
            "step": int(self.steps[slot]),
            "penalties": self._penalties,
            "counts": None if self.counts is None else self.counts[slot],
            "bias": self.bias,
            "candidates": None if node is None or self.choice is None else self.choice.candidates(node),
        }


def address(array: np.ndarray | None) -> int | None:
    """The address of an array's memory for csrc/; None for None."""
    return None if array is None else array.ctypes.data


def _bias(sampling: Sampling, vocabulary: int) -> np.ndarray | None:
    if not sampling.logit_bias:
        return None
    bias = np.zeros(vocabulary, np.float32)
    for token, value in sampling.logit_bias.items():
        if token >= vocabulary:
            raise ConfigError(f"logit_bias names token {token}, but the vocabulary has {vocabulary}.")
        bias[token] = value
    return bias
