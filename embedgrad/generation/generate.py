"""Generates answers to queries with a prompt. The queries' shared prefix is computed once; queries are decoded in
batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from embedgrad.engine.model import Model
from embedgrad.generation.constrained import ForcedChoice
from embedgrad.generation.kv_cache import KeyValueCache
from embedgrad.generation.loops import loop_for
from embedgrad.generation.prefill import prefill_prefix
from embedgrad.generation.sampling import Sampling
from embedgrad.generation.slots import Limits, check_bias
from embedgrad.generation.writer import Generation, Request, Writer
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import Rendered, answer_tokens, end_token, render_query
from embedgrad.prompt.tokenise import continue_with
from embedgrad.util.errors import ConfigError, ContextError, DataError
from embedgrad.util.interrupts import interruptible

QUERY = str | Sequence[int]
REFILL = 4  # new queries enter when 1/REFILL of the slots are free; one by one, each would be a small matrix product


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
    first_stream: int = 0,
) -> list[Generation]:
    """`generate` for rendered queries.

    first_stream: the first query's stream of random numbers; the others have those that follow.
    on_prefill: on_prefill(first index, cache, logits [B, V]) is called for each batch of consecutive queries before
        their first tokens are chosen. It may advance the cache, but must rewind it.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, but must be at least 1.")
    if not rendered:
        return []
    end = end_token(model, prompt)
    choice = forced_choice(model, prompt, sampling.choices, end)
    return write_sequences(
        model, prompt.embeddings.to(model.device), end, rendered, sampling, choice, batch_size=batch_size,
        on_answer=on_answer, on_token=on_token, on_prefill=on_prefill, first_stream=first_stream,
    )  # fmt: skip


def write_sequences(
    model: Model,
    embeddings: Tensor,
    end: int | None,
    rendered: Sequence[Rendered],
    sampling: Sampling,
    choice: ForcedChoice | None = None,
    *,
    batch_size: int = 32,
    on_answer: Callable[[int, Generation], None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    on_prefill: Callable[[int, KeyValueCache, Tensor], None] | None = None,
    first_stream: int = 0,
) -> list[Generation]:
    """`write_answers` for at least one sequence and no prompt object.

    embeddings: [k, d], the prompt rows. end: the token that ends an answer, besides the model's own end tokens. choice:
    the continuations of `sampling.choices`.
    """
    check_room(model, rendered)
    check_bias(sampling, model.config.vocab_size)
    with model.lock:
        prefix = prefill_prefix(model, embeddings, rendered[0], common_prefix(rendered))
        each_token = bool(sampling.stop) or on_token is not None
        callbacks = on_token is not None or on_answer is not None
        writer = Writer(
            model, embeddings, prefix, limits_of(model, end), min(batch_size, len(rendered)), sampling.max_new_tokens,
            lambda slots: loop_for(model, slots, each_token=each_token, callbacks=callbacks),
        )  # fmt: skip
        answers: dict[int, Generation] = {}

        def request(index: int, sequence: Rendered) -> Request:
            def take(answer: Generation) -> None:
                answers[index] = answer
                if on_answer is not None:
                    on_answer(index, answer)

            def fail(error: ConfigError) -> None:
                raise ConfigError(f"query {index}: {error}")

            took = None if on_token is None else lambda token, *_: on_token(index, token)
            return Request(sequence, sampling, take, fail, first_stream + index, choice, took)

        waiting = [request(index, sequence) for index, sequence in enumerate(rendered)]
        if on_prefill is not None:
            writer.on_prefill = lambda requests, cache, logits: on_prefill(
                requests[0].stream - first_stream, cache, logits
            )
        with interruptible() as interrupt:
            while len(answers) < len(rendered):
                entering = waiting[: len(writer.slots.free())]
                del waiting[: len(entering)]
                if entering:
                    writer.enter(entering)
                writer.run(max(1, writer.slots.size // REFILL) if waiting else 0, lambda: interrupt.requested)
                if interrupt.requested:
                    raise KeyboardInterrupt
    return [answers[index] for index in range(len(rendered))]


def check_room(model: Model, rendered: Sequence[Rendered], names: Sequence[str] = ()) -> None:
    """Raises ContextError for a query whose input is as long as the model's context or longer.

    names: what messages call the queries; none: "query" and their number.
    """
    room = model.config.max_position
    for i, sequence in enumerate(rendered):
        if len(sequence.ids) >= room:
            raise ContextError(
                f"{names[i] if names else f'query {i}'} takes {len(sequence.ids)} tokens with its prompt: no room for "
                f"an answer is left in the model's context of {model.config.context_told}; shorten it, or have queries "
                f"cut (data.query_tokens)."
            )


def common_prefix(sequences: Sequence[Rendered]) -> int:
    """Length of the prefix that all sequences share. At least one token of each sequence comes after it."""
    first = sequences[0]
    length = min(len(s.ids) for s in sequences) - 1
    for s in sequences[1:]:
        same = 0
        while same < length and s.ids[same] == first.ids[same] and s.prompt_rows[same] == first.prompt_rows[same]:
            same += 1
        length = same
    return length


def forced_choice(
    model: Model, prompt: SoftPrompt | None, texts: Sequence[str], end: int | None
) -> ForcedChoice | None:
    """The trie of `texts` as answers with a prompt, or to plain text; None without texts.

    end: the token that ends an answer; None: the model's own. Raises DataError where there is none.
    """
    if not texts:
        return None
    stop = min(model.tokenizer.eos_ids, default=None) if end is None else end
    if stop is None:
        raise DataError("the model has no token that ends a text, so an answer cannot be one of a list.")
    if prompt is None:
        return ForcedChoice.among([continue_with(model.tokenizer, text) for text in texts], stop)
    return ForcedChoice.among([answer_tokens(model, prompt, text) for text in texts], stop)


def limits_of(model: Model, end: int | None) -> Limits:
    """The limits of answers that the token `end` ends, besides the model's own end tokens."""
    stop = frozenset(model.tokenizer.eos_ids) | ({end} if end is not None else set())
    return Limits(stop, model.config.max_position)
