"""Generates answers to queries with a prompt. The queries' shared prefix is computed once; queries are decoded in
batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from embedgrad.engine.model import Model
from embedgrad.generation.constrained import ForcedChoice
from embedgrad.generation.entropy import loop_period, trajectory_entropy
from embedgrad.generation.kv_cache import KeyValueCache
from embedgrad.generation.loops import loop_for
from embedgrad.generation.prefill import prefill_prefix, prefill_suffixes
from embedgrad.generation.sampling import Sampling
from embedgrad.generation.slots import FREE, RUNNING, STOP, STOP_REASONS, Limits, Slots
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import Rendered, answer_tokens, end_token, render_query
from embedgrad.util.errors import ConfigError, ContextError, DataError
from embedgrad.util.interrupts import StopRequest, interruptible

QUERY = str | Sequence[int]
REFILL = 4  # new queries enter when 1/REFILL of the slots are free; one by one, each would be a small matrix product
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


def generate(
    model: Model,
    prompt: SoftPrompt,
    queries: Sequence[QUERY],
    sampling: Sampling | None = None,
    *,
    batch_size: int = 32,
    on_answer: Callable[[int, Generation], None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """The model's answers to `queries` (texts or lists of token ids), in the order of the queries.

    sampling: None: the defaults of `Sampling`.
    batch_size: queries that are decoded at the same time. When an answer is finished, another query takes its place.
        The batch size changes speed and memory use only.
    on_answer: on_answer(index, generation) is called after each answer.
    on_token: on_token(index, id) is called after each token of an answer.

    Ctrl-C or an exception in a callback ends the call within one token. Calls of several threads run one after the
    other. A callback may use the model itself, but must not wait for another thread that uses it.

    Raises PromptError, DataError or ContextError (no room for an answer) before the first answer. Raises ConfigError
    where logit_bias names a token outside the vocabulary or the logits hold NaN or +inf or are all -inf.
    """
    if isinstance(queries, str):
        raise DataError("generate takes a list of queries, not one text; put it into a list.")
    prompt.check_model(model)
    rendered = [render_query(model, prompt, query, where=f"query {i}") for i, query in enumerate(queries)]
    return write_answers(
        model,
        prompt,
        rendered,
        Sampling() if sampling is None else sampling,
        batch_size=batch_size,
        on_answer=on_answer,
        on_token=on_token,
    )


def write_answers(
    model: Model,
    prompt: SoftPrompt,
    rendered: Sequence[Rendered],
    sampling: Sampling,
    *,
    batch_size: int = 32,
    on_answer: Callable[[int, Generation], None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    on_prefill: Callable[[int, KeyValueCache, Tensor], None] | None = None,
) -> list[Generation]:
    """`generate` for rendered queries.

    on_prefill: on_prefill(first index, cache, logits [B, V]) is called for each batch of consecutive queries before
        their first tokens are chosen. It may advance the cache, but must rewind it.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, but must be at least 1.")
    if not rendered:
        return []
    check_room(model, rendered)
    with model.lock:
        prefix = prefill_prefix(model, prompt.embeddings.to(model.device), rendered[0], _prefix_length(rendered))
        writer = _Writer(model, prompt, rendered, sampling, min(batch_size, len(rendered)), prefix)
        writer.on_answer, writer.on_token, writer.on_prefill = on_answer, on_token, on_prefill
        with interruptible() as interrupt:
            writer.write(interrupt)
        return [writer.answers[i] for i in range(len(rendered))]


def check_room(model: Model, rendered: Sequence[Rendered]) -> None:
    """Raises ContextError for a query whose input is as long as the model's context or longer."""
    room = model.config.max_position
    for i, sequence in enumerate(rendered):
        if len(sequence.ids) >= room:
            raise ContextError(
                f"query {i} takes {len(sequence.ids)} tokens with its prompt: no room for an answer is left in "
                f"the model's context of {room}; shorten it."
            )


def _prefix_length(sequences: Sequence[Rendered]) -> int:
    """Length of the prefix that all sequences share. At least one token of each sequence comes after it."""
    first = sequences[0]
    length = min(len(s.ids) for s in sequences) - 1
    for s in sequences[1:]:
        same = 0
        while same < length and s.ids[same] == first.ids[same] and s.prompt_rows[same] == first.prompt_rows[same]:
            same += 1
        length = same
    return length


def _forced_choice(model: Model, prompt: SoftPrompt, texts: Sequence[str], end: int | None) -> ForcedChoice | None:
    """The trie of `texts` as answers; None without texts."""
    if not texts:
        return None
    stop = min(model.tokenizer.eos_ids) if end is None else end
    return ForcedChoice.among([answer_tokens(model, prompt, text) for text in texts], stop)


class _Writer:
    """Writes answers. Queries enter free slots, then a generation loop runs until enough slots are free again."""

    on_answer: Callable[[int, Generation], None] | None = None
    on_token: Callable[[int, int], None] | None = None
    on_prefill: Callable[[int, KeyValueCache, Tensor], None] | None = None

    def __init__(
        self,
        model: Model,
        prompt: SoftPrompt,
        rendered: Sequence[Rendered],
        sampling: Sampling,
        size: int,
        prefix: Tensor,
    ) -> None:
        self._model, self._rendered, self._sampling, self._prefix = model, rendered, sampling, prefix
        self._embeddings = prompt.embeddings.to(model.device)
        self._next = 0  # index of the next query to enter
        self.answers: dict[int, Generation] = {}
        end = end_token(model, prompt)
        limits = Limits(
            frozenset(model.tokenizer.eos_ids) | ({end} if end is not None else set()), model.config.max_position
        )
        self._slots = Slots(
            size, model.config.vocab_size, sampling, limits, _forced_choice(model, prompt, sampling.choices, end)
        )
        # A stop text may begin inside a token and span several tokens. The last `_tail` tokens always contain it.
        self._tail = max((len(text.encode()) for text in sampling.stop), default=0) + 1
        self._seen = [0] * size  # length of each slot's answer after the last step

    def write(self, interrupt: StopRequest) -> None:
        """Answers all queries. Raises KeyboardInterrupt when `interrupt` is set."""
        each_token = bool(self._sampling.stop) or self.on_token is not None
        callbacks = self.on_token is not None or self.on_answer is not None
        self._loop = loop_for(self._model, self._slots, each_token=each_token, callbacks=callbacks)
        while len(self.answers) < len(self._rendered):
            self._enter()
            waiting = self._next < len(self._rendered)
            refill = max(1, self._slots.size // REFILL) if waiting else 0
            self._loop.run(lambda: self._after_step(interrupt), refill)
            if interrupt.requested:
                raise KeyboardInterrupt

    def _enter(self) -> None:
        """Puts queries into the free slots and computes their prefill."""
        free = self._slots.free()
        first = self._next
        batch = self._rendered[first : first + len(free)]
        if not batch:
            return
        slots = free[: len(batch)]
        self._next += len(batch)
        cache, logits = prefill_suffixes(self._model, self._embeddings, batch, self._prefix)
        if self.on_prefill is not None:
            self.on_prefill(first, cache, logits)
        for n, (slot, sequence) in enumerate(zip(slots, batch, strict=True)):
            self._slots.enter(slot, first + n, sequence.ids)
            self._seen[slot] = 0
        self._loop.enter(cache, logits, slots)

    def _after_step(self, interrupt: StopRequest) -> bool:
        """Handles the tokens of the last step. Returns True to stop the loop."""
        slots = self._slots
        if self._sampling.stop or self.on_token is not None:
            for slot in np.flatnonzero(slots.lengths != self._seen).tolist():
                self._seen[slot] = int(slots.lengths[slot])
                if slots.reasons[slot] != FREE:
                    self._look_at(slot)
        ended = np.flatnonzero((slots.reasons != RUNNING) & (slots.reasons != FREE)).tolist()
        slots.check(ended)
        for slot in ended:
            self._finish(slot, None)
        return interrupt.requested

    def _look_at(self, slot: int) -> None:
        """Handles a slot's new token: calls on_token, and ends the answer at a stop text."""
        slots = self._slots
        index, ids = int(slots.streams[slot]), slots.ids[slot, : slots.lengths[slot]]
        if self.on_token is not None:
            self.on_token(index, int(ids[-1]))
        text = self._stopped_text(ids.tolist())
        if text is not None:
            if slots.reasons[slot] == RUNNING:
                slots.stop(slot)
            slots.reasons[slot] = STOP
            self._finish(slot, text)

    def _finish(self, slot: int, text: str | None) -> None:
        """Stores the answer of a slot that has ended, and frees the slot. text: the answer's text; None: decode it."""
        slots = self._slots
        index, length = int(slots.streams[slot]), int(slots.lengths[slot])
        ids, numbers = slots.ids[slot, :length].tolist(), int(slots.steps[slot])
        answer = Generation(
            self._model.tokenizer.decode(ids) if text is None else text,
            ids,
            STOP_REASONS[int(slots.reasons[slot])],
            slots.log_probability[slot, :numbers].tolist(),
            slots.entropy[slot, :numbers].tolist(),
        )
        slots.reasons[slot] = FREE
        self.answers[index] = answer
        if self.on_answer is not None:
            self.on_answer(index, answer)

    def _stopped_text(self, ids: list[int]) -> str | None:
        """The text before the first stop text; None where there is no stop text."""
        if not self._sampling.stop:
            return None
        tail = self._model.tokenizer.decode(ids[-self._tail :])
        if not any(stop in tail for stop in self._sampling.stop):
            return None
        text = self._model.tokenizer.decode(ids)
        places = [at for at in (text.find(stop) for stop in self._sampling.stop) if at >= 0]
        return text[: min(places)] if places else None
