"""Answers to queries behind a prompt: what all queries share is computed once, then all are decoded together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from embedgrad.errors import ConfigError, ContextError, DataError
from embedgrad.memory import StepSize, activation_bytes
from embedgrad.model.decoding import KeyValueCache
from embedgrad.model.model import Model
from embedgrad.model.step import build_step
from embedgrad.prefix_cache import keys_and_values
from embedgrad.prompt import SoftPrompt
from embedgrad.rendering import Rendered, end_token, render_query
from embedgrad.sampling import Sampling, choose
from embedgrad.tree import pack_branches

QUERY = str | Sequence[int]


@dataclass(frozen=True)
class Generation:
    """One answer. `ids` are its tokens without the stop token; stop_reason: "stop" (a stop token or a stop text),
    "length" (max_new_tokens), "context" (the model's context is full)."""

    text: str
    ids: list[int]
    stop_reason: str


@dataclass
class _Sequence:
    """One answer while it is being written."""

    index: int
    room: int  # tokens that still fit into the model's context
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)


def generate(
    model: Model,
    prompt: SoftPrompt,
    queries: Sequence[QUERY],
    sampling: Sampling | None = None,
    *,
    batch_size: int = 32,
    on_answer: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """The model's answers to `queries` (texts, or lists of token ids), in their order.

    `batch_size` queries are decoded at a time; it changes speed and memory only. `on_answer(index, generation)` is
    called as each answer is finished. Raises PromptError, DataError, ContextError (a query that fills the context),
    all before the first answer.
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
    )


def write_answers(
    model: Model,
    prompt: SoftPrompt,
    rendered: Sequence[Rendered],
    sampling: Sampling,
    *,
    batch_size: int = 32,
    on_answer: Callable[[int, Generation], None] | None = None,
    on_prefill: Callable[[int, KeyValueCache, Tensor], None] | None = None,
) -> list[Generation]:
    """`generate` for rendered queries. `on_prefill(first index, cache, logits [B, V])` sees each batch before its first
    token is chosen; it may go on with the cache as long as it rewinds it."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, but must be at least 1.")
    if not rendered:
        return []
    check_room(model, rendered)
    trunk = _common_prefix(rendered)
    kept = keys_and_values(
        model, rendered[0].ids[:trunk], (), (), prompt.embeddings.to(model.device), rendered[0].prompt_rows[:trunk]
    )
    end = end_token(model, prompt)
    writer = _Writer(
        model, prompt, sampling, {*model.tokenizer.eos_ids, *(() if end is None else (end,))}, on_answer, on_prefill
    )
    for start in range(0, len(rendered), batch_size):
        writer.write(rendered[start : start + batch_size], start, kept)
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


class _Writer:
    """Writes answers, a batch at a time."""

    def __init__(
        self,
        model: Model,
        prompt: SoftPrompt,
        sampling: Sampling,
        stop_ids: set[int],
        on_answer: Callable[[int, Generation], None] | None,
        on_prefill: Callable[[int, KeyValueCache, Tensor], None] | None,
    ) -> None:
        self.model = model
        self.embeddings = prompt.embeddings.to(model.device)
        self.sampling = sampling
        self.stop_ids = stop_ids
        self.on_answer = on_answer
        self.on_prefill = on_prefill
        self.answers: dict[int, Generation] = {}
        # A stop text can begin in the middle of a token and can span several; this many tokens of the end hold it.
        self._tail = max((len(text.encode()) for text in sampling.stop), default=0) + 1

    def write(self, batch: Sequence[Rendered], start: int, trunk: Tensor) -> None:
        """Answer `batch`, whose first query has the index `start`, behind the keys and values `trunk`."""
        room = self.model.config.max_position
        active = [_Sequence(i, room - len(s.ids), self.sampling.generator(i)) for i, s in enumerate(batch, start)]
        cache, hidden = self._prefill(batch, trunk)
        logits = cache.logits(hidden)
        if self.on_prefill is not None:
            self.on_prefill(start, cache, logits)
        while True:
            chosen = choose(logits, self.sampling, [s.generator for s in active])
            going = [n for n, (s, token) in enumerate(zip(active, chosen, strict=True)) if not self._append(s, token)]
            if not going:
                return
            if len(going) < len(active):
                active = [active[n] for n in going]
                cache.keep(torch.tensor(going, device=self.model.device))
            logits = cache.logits(cache.advance(torch.tensor([s.ids[-1] for s in active], device=self.model.device)))

    def _prefill(self, batch: Sequence[Rendered], trunk: Tensor) -> tuple[KeyValueCache, Tensor]:
        """Keys and values of what each sequence does not share, and the hidden state of its last token [B, d]."""
        model, shared = self.model, trunk.shape[2]
        tree = pack_branches(batch, shared)
        step = build_step(model.config, tree, (trunk,) if shared else (), model.dtype, model.device, rows=tree.leaves)
        lengths = torch.tensor([len(s.ids) - shared for s in batch])
        cache = KeyValueCache(model, trunk, lengths)
        sequence = torch.repeat_interleave(torch.arange(len(batch)), lengths)
        at = torch.cat([torch.arange(int(n)) for n in lengths])
        size = StepSize(tree.num_tokens, shared, len(batch), None, 0)
        model.arena.begin(activation_bytes(model.config, size, model.dtype, None))
        place = sequence.to(model.device), at.to(model.device)
        hidden = model.decoder.keys_and_values(
            self.embeddings, step, lambda layer, k, v: cache.fill(layer, k, v, *place)
        )
        assert hidden is not None
        return cache, hidden

    def _append(self, sequence: _Sequence, token: int) -> bool:
        """Add `token`; True when that ends the answer."""
        reason, text = None, None
        if token in self.stop_ids:
            reason = "stop"
        else:
            sequence.ids.append(token)
            sequence.room -= 1
            text = self._stopped_text(sequence.ids)
            if text is not None:
                reason = "stop"
            elif len(sequence.ids) >= self.sampling.max_new_tokens:
                reason = "length"
            elif sequence.room <= 0:
                reason = "context"
        if reason is None:
            return False
        text = self.model.tokenizer.decode(sequence.ids) if text is None else text
        answer = Generation(text, sequence.ids, reason)
        self.answers[sequence.index] = answer
        if self.on_answer is not None:
            self.on_answer(sequence.index, answer)
        return True

    def _stopped_text(self, ids: list[int]) -> str | None:
        """The text before the first stop text, or None where none has occurred."""
        if not self.sampling.stop:
            return None
        tail = self.model.tokenizer.decode(ids[-self._tail :])
        if not any(stop in tail for stop in self.sampling.stop):
            return None
        text = self.model.tokenizer.decode(ids)
        places = [at for at in (text.find(stop) for stop in self.sampling.stop) if at >= 0]
        return text[: min(places)] if places else None
