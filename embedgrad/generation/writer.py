"""Writes answers in slots: requests enter free slots, a generation loop runs, and answers leave.

All requests of a writer share a prefix. Each has its own settings, callbacks, and stream of random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from embedgrad.engine.model import Model
from embedgrad.generation.constrained import ForcedChoice
from embedgrad.generation.entropy import loop_period, trajectory_entropy
from embedgrad.generation.kv_cache import KeyValueCache
from embedgrad.generation.loops import Loop
from embedgrad.generation.prefill import prefill_suffixes
from embedgrad.generation.sampling import Sampling
from embedgrad.generation.slots import FREE, RUNNING, STOP, STOP_REASONS, Limits, Slots
from embedgrad.prompt.rendering import Rendered
from embedgrad.util.errors import ConfigError

WINDOW = 64  # tokens over which the windowed entropy is taken, so that a loop at the end of a long answer shows


@dataclass(frozen=True)
class Generation:
    """An answer.

    text: the decoded answer, without a stop text. ids: its tokens without the stop token.
    stop_reason: "stop" (a stop token, a stop text, or a complete choice), "length" (max_new_tokens) or "context" (the
        model's context is full).
    log_probabilities: for each of `ids`, and for the stop token if there is one, the natural logarithm of its
        probability in the model's own distribution, before temperature, penalties and bias.
    entropies: for the same tokens, the normalised entropy of that distribution
        (`embedgrad.generation.entropy.token_entropy`).
    """

    text: str
    ids: list[int]
    stop_reason: str
    log_probabilities: list[float] = field(default_factory=list, compare=False, repr=False)
    entropies: list[float] = field(default_factory=list, compare=False, repr=False)

    @property
    def trajectory_entropy(self) -> float:
        """Entropy of the whole answer's n-grams (`embedgrad.generation.entropy.trajectory_entropy`)."""
        return trajectory_entropy(self.ids)

    @property
    def windowed_entropy(self) -> float:
        """The minimum of the trajectory entropy over all windows of WINDOW tokens."""
        return trajectory_entropy(self.ids, window=WINDOW)

    @property
    def loop_period(self) -> int:
        """The period, in tokens, of a loop at the end of the answer; 0 if there is no loop."""
        return loop_period(self.ids)


@dataclass(eq=False)
class Request:
    """A query to be answered.

    rendered: its input. stream: its stream of random numbers. choice: the continuations of `sampling.choices`.
    on_token: on_token(id, log-probability, logits [V]) is called after each token; logits is None unless
    `wants_logits`. on_answer: called with the answer. on_failure: called where no token can be chosen.
    """

    rendered: Rendered
    sampling: Sampling
    on_answer: Callable[[Generation], object]
    on_failure: Callable[[ConfigError], object]
    stream: int = 0
    choice: ForcedChoice | None = None
    on_token: Callable[[int, float, Tensor | None], object] | None = None
    wants_logits: bool = False

    @property
    def tail(self) -> int:
        """A stop text may begin inside a token and span several. So many of the last tokens always contain it."""
        return max((len(text.encode()) for text in self.sampling.stop), default=0) + 1


class Writer:
    """`size` slots for answers of at most `capacity` tokens.

    embeddings: [k, d], the prompt rows. prefix: [L, 2, S, G, D], keys and values of the first S tokens of all requests.
    make_loop: make_loop(slots) gives the generation loop.
    """

    on_prefill: Callable[[Sequence[Request], KeyValueCache, Tensor], None] | None = None

    def __init__(
        self,
        model: Model,
        embeddings: Tensor,
        prefix: Tensor,
        limits: Limits,
        size: int,
        capacity: int,
        make_loop: Callable[[Slots], Loop],
    ) -> None:
        self._model, self._embeddings, self._prefix = model, embeddings, prefix
        self.slots = Slots(size, model.config.vocab_size, capacity, limits)
        self._loop = make_loop(self.slots)
        self._requests: list[Request | None] = [None] * size
        self._seen = np.zeros(size, np.int32)  # length of each slot's answer after the last step
        self._watched = np.zeros(size, np.bool_)  # slots whose every token is looked at

    @property
    def prefix_length(self) -> int:
        """Number of tokens that all requests begin with."""
        return self._prefix.shape[2]

    @property
    def running(self) -> int:
        """Number of answers that are being written."""
        return int(self.slots.running[0])

    def enter(self, requests: Sequence[Request]) -> None:
        """Puts requests into free slots, of which there must be enough, and computes their prefill."""
        slots = self.slots.free()[: len(requests)]
        batch = [request.rendered for request in requests]
        cache, logits = prefill_suffixes(self._model, self._embeddings, batch, self._prefix)
        if self.on_prefill is not None:
            self.on_prefill(requests, cache, logits)
        for slot, request in zip(slots, requests, strict=True):
            self.slots.enter(slot, request.stream, request.rendered.ids, request.sampling, request.choice)
            self._requests[slot] = request
            self._seen[slot] = 0
            self._watched[slot] = bool(request.sampling.stop) or request.on_token is not None
        self._loop.enter(cache, logits, slots)

    def run(self, refill: int, interrupted: Callable[[], bool]) -> None:
        """Writes tokens until no answer is running, `refill` slots are free (0: ignored), or `interrupted()`.

        `interrupted` is called after each step.
        """
        self._loop.run(lambda: self._after_step() or interrupted(), refill)

    def cancel(self, request: Request) -> None:
        """Ends a running answer without calling its callbacks. Only between two steps, or from within a callback."""
        for slot, other in enumerate(self._requests):
            if other is request and self.slots.reasons[slot] == RUNNING:
                self.slots.stop(slot)
                self._free(slot)

    def _after_step(self) -> bool:
        """Handles the tokens of the last step."""
        slots = self.slots
        for slot in np.flatnonzero(self._watched & (slots.lengths != self._seen)).tolist():
            self._seen[slot] = int(slots.lengths[slot])
            request = self._requests[slot]
            if request is not None and slots.reasons[slot] != FREE:
                self._look_at(slot, request)
        for slot in np.flatnonzero((slots.reasons != RUNNING) & (slots.reasons != FREE)).tolist():
            self._finish(slot, None)
        return False

    def _look_at(self, slot: int, request: Request) -> None:
        """Handles a slot's new token: calls on_token, and ends the answer at a stop text."""
        slots = self.slots
        length = int(slots.lengths[slot])
        if request.on_token is not None:
            logits = self._loop.logits(slot) if request.wants_logits else None
            at = length - 1
            request.on_token(int(slots.ids[slot, at]), float(slots.log_probability[slot, at]), logits)
        if not request.sampling.stop or slots.reasons[slot] == FREE:
            return
        text = self._stopped_text(slots.ids[slot, :length].tolist(), request)
        if text is not None:
            if slots.reasons[slot] == RUNNING:
                slots.stop(slot)
            slots.reasons[slot] = STOP
            self._finish(slot, text)

    def _finish(self, slot: int, text: str | None) -> None:
        """Hands the answer of a slot that has ended over, and frees the slot. text: the answer's; None: decode it."""
        slots, request = self.slots, self._requests[slot]
        assert request is not None
        problem = slots.problem(slot)
        if problem:
            self._free(slot)
            request.on_failure(ConfigError(problem))
            return
        length = int(slots.lengths[slot])
        ids, numbers = slots.ids[slot, :length].tolist(), int(slots.steps[slot])
        answer = Generation(
            self._model.tokenizer.decode(ids) if text is None else text,
            ids,
            STOP_REASONS[int(slots.reasons[slot])],
            slots.log_probability[slot, :numbers].tolist(),
            slots.entropy[slot, :numbers].tolist(),
        )
        self._free(slot)
        request.on_answer(answer)

    def _free(self, slot: int) -> None:
        self.slots.reasons[slot] = FREE
        self._requests[slot] = None

    def _stopped_text(self, ids: list[int], request: Request) -> str | None:
        """The text before the first stop text; None where there is no stop text."""
        stops = request.sampling.stop
        tail = self._model.tokenizer.decode(ids[-request.tail :])
        if not any(stop in tail for stop in stops):
            return None
        text = self._model.tokenizer.decode(ids)
        places = [at for at in (text.find(stop) for stop in stops) if at >= 0]
        return text[: min(places)] if places else None
