"""The state of the answers that are being written. Every array has one entry per slot.

`csrc/common/advance.h` and `csrc/common/sampling.h` take these arrays. `choose` and `advance` do the same as the
generation loop in csrc/, for every backend.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedgrad.backends import native_core
from embedgrad.generation.constrained import ForcedChoice, forest
from embedgrad.generation.sampler import MAX_VOCABULARY, PROBLEMS, Penalties, choose_token
from embedgrad.generation.sampling import Sampling
from embedgrad.util.errors import ConfigError

RUNNING, STOP, LENGTH, CONTEXT, FAILED, FREE = range(6)  # StopReason in csrc/common/advance.h; FREE: an empty slot
STOP_REASONS = {STOP: "stop", LENGTH: "length", CONTEXT: "context"}
_PARAMS = np.dtype(native_core.SamplingParams)


@dataclass(frozen=True)
class Limits:
    """Limits of an answer. stop_ids: tokens that end it. max_position: the model's context length in tokens."""

    stop_ids: frozenset[int]
    max_position: int


class Slots:
    """`size` slots over a vocabulary of V tokens, for answers of at most C = `capacity` tokens.

    ids: [size, C], the answers' tokens.
    entropy, log_probability: [size, C], for each token, also for the stop token, which is not in `ids`.
    params: [size], the sampler's settings. most: [size], the longest answer in tokens.
    lengths: [size], tokens of the answer. steps: [size], tokens that were chosen, including a stop token.
    inputs, positions: [size], the last token and its position in the sequence.
    streams: [size], the query's stream of random numbers. reasons: [size], RUNNING, FREE, or why the answer has ended.
    tokens, status: [size], the token just chosen; 0 or a key of `sampler.PROBLEMS`.
    running: [1], number of running slots.

    The following arrays are None until a query needs them; `version` grows when one of them is another array.
    counts: [size, V], occurrences of each token, for penalties.
    bias, bias_rows: [rows, V] and [size], what is added to the logits, and which row of it a slot takes (−1: none).
    choice, nodes: the continuations of all slots with a forced choice, and [size], each slot's node (−1: free).
    """

    def __init__(self, size: int, vocabulary: int, capacity: int, limits: Limits) -> None:
        self.size, self.vocabulary, self.limits = size, vocabulary, limits
        if vocabulary > MAX_VOCABULARY:
            raise ConfigError(f"the vocabulary has {vocabulary} tokens; the samplers take at most {MAX_VOCABULARY}.")
        self.capacity = min(capacity, limits.max_position)
        self.ids = np.zeros((size, self.capacity), np.int32)
        self.entropy = np.zeros((size, self.capacity), np.float32)
        self.log_probability = np.zeros((size, self.capacity), np.float32)
        self.params, self.most = np.zeros(size, _PARAMS), np.ones(size, np.int32)
        self.lengths, self.inputs, self.positions, self.tokens, self.status = np.zeros((5, size), np.int32)
        self.reasons = np.full(size, FREE, np.int32)
        self.running = np.zeros(1, np.int32)
        self.steps, self.streams = np.zeros(size, np.uint32), np.zeros(size, np.uint64)
        self.stop_tokens = np.array(sorted(limits.stop_ids), np.int32)
        self.version = 0
        self.counts: np.ndarray | None = None
        self.bias: np.ndarray | None = None
        self.bias_rows: np.ndarray | None = None
        self.choice: ForcedChoice | None = None
        self.nodes: np.ndarray | None = None
        self._samplings = [Sampling()] * size
        self._choices: list[ForcedChoice | None] = [None] * size
        self._trees: list[ForcedChoice] = []  # in `choice`
        self._roots: dict[int, int] = {}  # of each tree in `choice`, by the id of its object
        self._biases: list[Mapping[int, float] | None] = []  # what each row of `bias` holds
        try:
            self._core: ctypes.CDLL | None = native_core.library()
        except ImportError:
            self._core = None

    def enter(
        self, slot: int, stream: int, ids: Sequence[int], sampling: Sampling, choice: ForcedChoice | None = None
    ) -> None:
        """Puts a query into a free slot. ids: tokens of its input. stream: its stream of random numbers.

        choice: the continuations of `sampling.choices`. Raises ConfigError where logit_bias names a token outside the
        vocabulary.
        """
        check_bias(sampling, self.vocabulary)
        s, penalties = sampling, Penalties.of(sampling)
        self.params[slot] = (
            s.temperature, s.top_k, s.top_p, s.min_p, penalties.repetition, penalties.presence, penalties.frequency,
            s.seed,
        )  # fmt: skip
        self._samplings[slot] = sampling
        self.most[slot] = min(sampling.max_new_tokens, self.capacity)
        self.lengths[slot] = self.steps[slot] = 0
        self.streams[slot], self.positions[slot] = stream, len(ids) - 1
        if sampling.penalises and self.counts is None:
            self.counts = np.zeros((self.size, self.vocabulary), np.int32)
            self.version += 1
        if self.counts is not None and sampling.penalises:
            self.counts[slot] = np.bincount(np.asarray(ids), minlength=self.vocabulary)
        self._set_bias(slot, sampling.logit_bias)
        self._set_choice(slot, choice)
        self.reasons[slot] = RUNNING
        self.running[0] += 1

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
                self.tokens[slot] = choose_token(own_logits, self._samplings[slot], **self._slot_options(slot))
            return
        index = np.asarray(slots)
        kept = ("params", "streams", "steps", "counts", "bias_rows", "nodes")
        arrays = {name: x[index] for name in kept if (x := getattr(self, name)) is not None}
        tokens, status = np.empty((2, len(index)), np.int32)
        batch = self.batch(np.ascontiguousarray(logits), {**arrays, "tokens": tokens, "status": status})
        wrong = self._core.embedgrad_sample_cpu(ctypes.byref(batch))
        if wrong:
            raise ConfigError(f"the sampler refuses its call (number {wrong}).")
        self.tokens[index], self.status[index] = tokens, status

    def advance(self, slot: int) -> None:
        """Appends the chosen token to the answer, or ends it, as `advance_sequence` in csrc/common/advance.h."""
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
        if self.nodes is not None and self.choice is not None and self.nodes[slot] >= 0:
            self.nodes[slot] = node = self.choice.follow(int(self.nodes[slot]), token)
            complete = not self.choice.candidates(node)
        if complete:
            self._end(slot, STOP)
        elif self.lengths[slot] >= self.most[slot]:
            self._end(slot, LENGTH)
        elif self.positions[slot] + 1 >= self.limits.max_position:
            self._end(slot, CONTEXT)

    def problem(self, slot: int) -> str:
        """Why no token could be chosen for a slot; empty where one could."""
        return PROBLEMS[int(self.status[slot])] if self.reasons[slot] == FAILED else ""

    def batch(self, logits: np.ndarray, arrays: Mapping[str, Any]) -> native_core.SamplingBatch:
        """The arguments of the sampler in csrc/ for n sequences.

        logits: [n, V]. arrays: by name, those of `SamplingBatch` with one entry for each of these sequences; `reasons`
        where only running sequences are sampled.
        """
        tree = self.choice
        return native_core.SamplingBatch(
            address(arrays["params"]), address(logits), self.vocabulary, len(arrays["tokens"]), self.vocabulary,
            *(address(arrays.get(name)) for name in ("streams", "steps", "counts")), address(self.bias),
            *(address(arrays.get(name)) for name in ("bias_rows", "nodes")),
            address(None if tree is None else tree.children), address(None if tree is None else tree.child_tokens),
            *(address(arrays.get(name)) for name in ("reasons", "tokens", "status")),
        )  # fmt: skip

    def _end(self, slot: int, reason: int) -> None:
        self.reasons[slot] = reason
        self.running[0] -= 1

    def _set_bias(self, slot: int, bias: Mapping[int, float]) -> None:
        """Gives a slot its row of `bias`. Slots with the same mapping share a row."""
        if not bias:
            if self.bias_rows is not None:
                self.bias_rows[slot] = -1
            return
        if self.bias_rows is None:
            self.bias_rows = np.full(self.size, -1, np.int32)
            self.version += 1
        self.bias_rows[slot] = -1
        used = {int(self.bias_rows[other]) for other in self.active()}
        row = next((r for r, known in enumerate(self._biases) if known is bias), None)
        row = next((r for r in range(len(self._biases)) if r not in used), None) if row is None else row
        if row is None:
            row = len(self._biases)
            more = np.zeros((max(1, len(self._biases)), self.vocabulary), np.float32)
            self.bias = more if self.bias is None else np.concatenate([self.bias, more])
            self._biases += [None] * len(more)
            self.version += 1
        assert self.bias is not None
        if self._biases[row] is not bias:
            self._biases[row] = bias
            self.bias[row] = 0
            with np.errstate(over="ignore"):  # what is beyond float32 forbids the token, as minus infinity does
                self.bias[row, list(bias)] = list(bias.values())
        self.bias_rows[slot] = row

    def _set_choice(self, slot: int, choice: ForcedChoice | None) -> None:
        """Gives a slot the root of its tree. A new tree makes a new forest, of it and those that are still used."""
        self._choices[slot] = choice
        if choice is None:
            if self.nodes is not None:
                self.nodes[slot] = -1
            return
        if self.nodes is None:
            self.nodes = np.full(self.size, -1, np.int32)
        if id(choice) not in self._roots or self.choice is None:
            used = [self._choices[other] for other in self.active() if self._choices[other] is not None]
            trees = list({id(tree): tree for tree in [*used, choice] if tree is not None}.values())
            self.choice, roots = forest(trees)
            new = {id(tree): root for tree, root in zip(trees, roots, strict=True)}
            for other in self.active():
                tree = self._choices[other]
                if tree is not None and other != slot:
                    self.nodes[other] += new[id(tree)] - self._roots[id(tree)]
            self._roots, self._trees = new, trees
            self.version += 1
        self.nodes[slot] = self._roots[id(choice)]

    def _slot_options(self, slot: int) -> dict[str, Any]:
        node = -1 if self.nodes is None else int(self.nodes[slot])
        row = -1 if self.bias_rows is None else int(self.bias_rows[slot])
        penalises = self._samplings[slot].penalises
        return {
            "stream": int(self.streams[slot]),
            "step": int(self.steps[slot]),
            "penalties": Penalties.of(self._samplings[slot]),
            "counts": self.counts[slot] if self.counts is not None and penalises else None,
            "bias": None if row < 0 or self.bias is None else self.bias[row],
            "candidates": None if node < 0 or self.choice is None else self.choice.candidates(node),
        }


def check_bias(sampling: Sampling, vocabulary: int) -> None:
    """Raises ConfigError where logit_bias names a token outside the vocabulary."""
    for token in sampling.logit_bias:
        if token >= vocabulary:
            raise ConfigError(f"logit_bias names token {token}, but the vocabulary has {vocabulary}.")


def address(array: np.ndarray | None) -> int | None:
    """The address of an array's memory for csrc/; None for None."""
    return None if array is None else array.ctypes.data
