"""Answers to queries behind a prompt: what all queries share is computed once, then all are decoded together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from embedgrad.entropy import loop_period, trajectory_entropy
from embedgrad.errors import ConfigError, ContextError, DataError
from embedgrad.forced_choice import ForcedChoice
from embedgrad.interrupts import StopRequest, interruptible
from embedgrad.loops import loop_for
from embedgrad.model.decoding import KeyValueCache
from embedgrad.model.model import Model
from embedgrad.prefill import own_contexts, shared_context
from embedgrad.prompt import SoftPrompt
from embedgrad.rendering import Rendered, answer_tokens, end_token, render_query
from embedgrad.sampling import Sampling
from embedgrad.slots import FREE, RUNNING, STOP, STOP_REASONS, Limits, Slots

QUERY = str | Sequence[int]
REFILL = 4  # new queries enter once a quarter of the slots are free: one by one, each would be a small matrix product
WINDOW = 64  # tokens; a loop at the end of a long answer shows in their entropy


@dataclass(frozen=True)
class Generation:
    """One answer.

    ids: its tokens without the stop token. stop_reason: "stop" (a stop token, a stop text, or a choice that is
    complete), "length" (max_new_tokens), "context" (the model's context is full). log_probabilities and entropies, one
    per token of ids and one for a stop token: of the token by the model's own distribution (natural logarithm), and of
    that distribution as a share of the largest possible (`embedgrad.entropy.token_entropy`).
    """

    text: str
    ids: list[int]
    stop_reason: str
    log_probabilities: list[float] = field(default_factory=list, compare=False, repr=False)
    entropies: list[float] = field(default_factory=list, compare=False, repr=False)

    @property
    def trajectory_entropy(self) -> float:
        """Of the whole answer (`embedgrad.entropy.trajectory_entropy`)."""
        return trajectory_entropy(self.ids)

    @property
    def windowed_entropy(self) -> float:
        """The least trajectory entropy of any WINDOW tokens in a row."""
        return trajectory_entropy(self.ids, window=WINDOW)

    @property
    def loop_period(self) -> int:
        """The period, in tokens, with which the answer ends; 0: it ends in no loop."""
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
    """The model's answers to `queries` (texts, or lists of token ids), in their order.

    `batch_size` queries are decoded at a time, and where one is answered the next takes its place; it changes speed and
    memory only. `on_answer(index, generation)` is called as each answer is finished, `on_token(index, id)` after each
    token that becomes part of an answer. Ctrl-C, and what these raise, ends the call within one token. Raises
    PromptError, DataError, ContextError (a query that fills the context), all before the first answer, and ConfigError
    (a logit_bias for a token that is none, logits that are no distribution).
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
    """`generate` for rendered queries. `on_prefill(first index, cache, logits [B, V])` sees queries that follow each
    other before their first token is chosen; it may go on with the cache as long as it rewinds it."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, but must be at least 1.")
    if not rendered:
        return []
    check_room(model, rendered)
    kept = shared_context(model, prompt.embeddings.to(model.device), rendered[0], _common_prefix(rendered))
    writer = _Writer(model, prompt, rendered, sampling, min(batch_size, len(rendered)), kept)
    writer.on_answer, writer.on_token, writer.on_prefill = on_answer, on_token, on_prefill
    with interruptible() as interrupt:
        writer.write(interrupt)
    return [writer.answers[i] for i in range(len(rendered))]


def check_room(model: Model, rendered: Sequence[Rendered]) -> None:
    """Raises ContextError where a query leaves no room for an answer in the model's context."""
    room = model.config.max_position
    for i, sequence in enumerate(rendered):
        if len(sequence.ids) >= room:
            raise ContextError(
                f"query {i} takes {len(sequence.ids)} tokens with its prompt: no room for an answer is left in "
                f"the model's context of {room}; shorten it."
            )


def _common_prefix(sequences: Sequence[Rendered]) -> int:
    """Tokens that all sequences begin with; every sequence keeps at least one token of its own."""
    first = sequences[0]
    length = min(len(s.ids) for s in sequences) - 1
    for s in sequences[1:]:
        same = 0
        while same < length and s.ids[same] == first.ids[same] and s.prompt_rows[same] == first.prompt_rows[same]:
            same += 1
        length = same
    return length


def _choice(model: Model, prompt: SoftPrompt, texts: Sequence[str], end: int | None) -> ForcedChoice | None:
    """The tree of `texts` as answers."""
    if not texts:
        return None
    stop = min(model.tokenizer.eos_ids) if end is None else end
    return ForcedChoice.among([answer_tokens(model, prompt, text) for text in texts], stop)


class _Writer:
    """Writes answers: queries enter free slots, a loop writes until slots are free again."""

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
        trunk: Tensor,
    ) -> None:
        self._model, self._rendered, self._sampling, self._trunk = model, rendered, sampling, trunk
        self._embeddings = prompt.embeddings.to(model.device)
        self._next = 0  # the first query that has not entered
        self.answers: dict[int, Generation] = {}
        end = end_token(model, prompt)
        limits = Limits(
            frozenset(model.tokenizer.eos_ids) | ({end} if end is not None else set()), model.config.max_position
        )
        self._slots = Slots(
            size, model.config.vocab_size, sampling, limits, _choice(model, prompt, sampling.choices, end)
        )
        # A stop text can begin in the middle of a token and can span several; this many tokens of the end hold it.
        self._tail = max((len(text.encode()) for text in sampling.stop), default=0) + 1
        self._seen = [0] * size  # tokens that each slot had after the step before

    def write(self, interrupt: StopRequest) -> None:
        """Answer all queries. Raises KeyboardInterrupt where `interrupt` asks for it."""
        each_token = bool(self._sampling.stop) or self.on_token is not None
        self._loop = loop_for(self._model, self._slots, each_token=each_token)
        while len(self.answers) < len(self._rendered):
            self._enter()
            waiting = self._next < len(self._rendered)
            refill = max(1, self._slots.size // REFILL) if waiting else 0
            self._loop.run(lambda: self._after_step(interrupt), refill)
            if interrupt.requested:
                raise KeyboardInterrupt

    def _enter(self) -> None:
        """Put queries into all free slots."""
        free = self._slots.free()
        first = self._next
        batch = self._rendered[first : first + len(free)]
        if not batch:
            return
        slots = free[: len(batch)]
        self._next += len(batch)
        cache, logits = own_contexts(self._model, self._embeddings, batch, self._trunk)
        if self.on_prefill is not None:
            self.on_prefill(first, cache, logits)
        for n, (slot, sequence) in enumerate(zip(slots, batch, strict=True)):
            self._slots.enter(slot, first + n, sequence.ids)
            self._seen[slot] = 0
        self._loop.enter(cache, logits, slots)

    def _after_step(self, interrupt: StopRequest) -> bool:
        """Look at what the last step has written; True to stop."""
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
        """A slot with a new token."""
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
        """The answer of a slot that has ended, with `text` where that is known; the slot is free afterwards."""
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
        """The text before the first stop text, or None where none has occurred."""
        if not self._sampling.stop:
            return None
        tail = self._model.tokenizer.decode(ids[-self._tail :])
        if not any(stop in tail for stop in self._sampling.stop):
            return None
        text = self._model.tokenizer.decode(ids)
        places = [at for at in (text.find(stop) for stop in self._sampling.stop) if at >= 0]
        return text[: min(places)] if places else None
