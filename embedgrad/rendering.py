"""One training sequence, or one query to be answered, as token ids with the rows of the prompt marked in it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from embedgrad.conversation import Conversation
from embedgrad.errors import ContextError, DataError, EmbedGradError, PromptError
from embedgrad.example import Example
from embedgrad.memo import PerObject
from embedgrad.template import Template
from embedgrad.tokenise import Slot, continue_with, tokenise_pieces, tokenise_whole, tokens_in_place, whole_text

if TYPE_CHECKING:
    from embedgrad.model.tokenizer import Tokenizer


class TokenisationWarning(UserWarning):
    """A rendering's ids are not those of tokenising the whole text at once."""


class ModelLike(Protocol):
    """What rendering needs of a model; of its config, `vocab_size` and `max_position`."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def config(self) -> Any: ...

    @property
    def name(self) -> str: ...


class PromptLike(Protocol):
    """What rendering needs of a prompt."""

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def text(self) -> str: ...

    @property
    def template(self) -> Template: ...


@dataclass(frozen=True)
class Rendered:
    """One sequence.

    ids: token ids; where the prompt stands, the ids that its anchor came from.
    prompt_rows: for each token the row of the prompt shown there, or −1.
    target_mask: for each token whether it is a target (its loss counts).
    constant_prefix: number of leading tokens, all before the first prompt row, that every query has with this template
        and prompt.
    """

    ids: list[int]
    prompt_rows: list[int]
    target_mask: list[bool]
    constant_prefix: int


def render(model: ModelLike, prompt: PromptLike, example: Example, where: str = "") -> Rendered:
    """`example` as one training sequence: the context (exactly what `render_query` gives), then the targets.

    The targets are the answer's tokens and, except with `Template.plain()` and `Template.text(end=False)`, the token
    that ends the answer; it is not added again where the answer ends with it already. Where the chat template trims an
    assistant's message, an answer given as text is trimmed alike.
    where: put in front of error messages ("train.jsonl, line 3"). Raises PromptError, DataError, ContextError,
    TemplateError.
    """
    try:
        return _plan_of(model, prompt).example(example)
    except EmbedGradError as error:
        _raise_at(where, error)


def render_query(model: ModelLike, prompt: PromptLike, query: str | Sequence[int], where: str = "") -> Rendered:
    """The context that the answer to `query` follows, without targets. Errors as in `render`."""
    try:
        return _plan_of(model, prompt).query(query)
    except EmbedGradError as error:
        _raise_at(where, error)


def end_token(model: ModelLike, prompt: PromptLike) -> int | None:
    """The token that ends an answer with this prompt's template, or None where the template has none."""
    return _plan_of(model, prompt).end_token


def answer_tokens(model: ModelLike, prompt: PromptLike, text: str) -> list[int]:
    """The tokens of `text` as an answer with this prompt's template, without what ends it. Raises as `render` does."""
    context = len(render_query(model, prompt, "x").ids)
    ids = render(model, prompt, Example("x", text)).ids[context:]
    end = end_token(model, prompt)
    return ids[: ids.index(end)] if end in ids else ids


def layout(model: ModelLike, template: Template, token_ids: Sequence[int], text: str) -> tuple[list[int], list[int]]:
    """(ids, prompt rows) of the template's context; the query's place is one token with id −1 and row −1."""
    return _plan(model, template, tuple(token_ids), text).layout()


def prompt_tokens(model: ModelLike, template: Template, text: str) -> list[int]:
    """The tokens of `text` as a prompt.

    They are those that `text` has alone. Only where a tokenizer splits it otherwise in its place, at all places alike
    and cleanly at its ends (those that put a space in front of every text do), they are the ones it has there, because
    the model knows these. Raises PromptError for an empty text.
    """
    tokenizer = model.tokenizer
    alone = _encode(tokenizer, text, "the prompt", PromptError)
    if not alone:
        raise PromptError("the prompt is empty: it needs at least one token.")
    if template.kind == "plain":
        return alone
    parts = Conversation(tokenizer, template, model.name).parts(Slot(tuple(alone), text, True), "x")
    if tokenise_whole(tokenizer, parts) is not None:
        return alone
    return tokens_in_place(tokenizer, parts, text) or alone


def check_ids(ids: Any, vocab_size: int, what: str, error: type[EmbedGradError]) -> list[int]:
    """`ids` as a list of ints in [0, vocab_size), at least one; else raises `error` with a sentence about `what`."""
    try:
        if isinstance(ids, (bytes, bytearray)):
            raise TypeError
        values = [operator.index(value) for value in ids]
    except TypeError:
        raise error(f"{what} must be text or a list of token ids, not {type(ids).__name__}.") from None
    if not values:
        raise error(f"{what} is empty: it needs at least one token.")
    low, high = min(values), max(values)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise error(f"{what} has the token id {wrong}, outside the model's vocabulary of {vocab_size} ids.")
    return values


def _raise_at(where: str, error: EmbedGradError) -> NoReturn:
    if where:
        raise type(error)(f"{where}: {error}") from error
    raise error


def _encode(tokenizer: Tokenizer, text: str, what: str, error: type[EmbedGradError]) -> list[int]:
    _check_unicode(text, what, error)
    return tokenizer.encode(text)


def _check_unicode(text: str, what: str, error: type[EmbedGradError]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise error(f"{what} has a character that is not valid Unicode (half of a surrogate pair).") from None


@dataclass(frozen=True)
class _Context:
    """Everything before the targets. `tail`: the text that the answer is a continuation of, `tail_ids`: its tokens, the
    last of `ids`; both empty where the answer starts on its own."""

    ids: list[int]
    rows: list[int]
    text: str
    tail: str
    tail_ids: list[int]


class _Plan:
    """What one prompt's renderings with one template and one model share."""

    def __init__(self, model: ModelLike, template: Template, token_ids: tuple[int, ...], text: str) -> None:
        self._tokenizer = model.tokenizer
        self._vocab_size = int(model.config.vocab_size)
        self._max_position = int(model.config.max_position)
        self._template = template
        self._name = model.name
        check_ids(token_ids, self._vocab_size, "the prompt", PromptError)
        if len(token_ids) >= self._max_position:
            raise ContextError(
                f"the prompt is longer than the context: {len(token_ids)} tokens, the model has {self._max_position}."
            )
        self._prompt = Slot(token_ids, text, True)
        self._conversation = Conversation(model.tokenizer, template, model.name)
        self._warned = True  # nothing to say about the stand-in queries of the next line
        self._prefix = self._common_prefix()
        self._warned = False
        if self._conversation.changes_prompt(text):
            self._warn("the chat template changes the prompt's text (it trims it, for instance)", text)

    @property
    def end_token(self) -> int | None:
        return self._conversation.answer.end

    def query(self, query: str | Sequence[int]) -> Rendered:
        context = self._context(query)
        self._check_length(len(context.ids), None)
        return Rendered(context.ids, context.rows, [False] * len(context.ids), self._constant(context))

    def example(self, example: Example) -> Rendered:
        context = self._context(example.query)
        targets = self._targets(context, example)
        self._check_length(len(context.ids), len(targets))
        return Rendered(
            context.ids + targets,
            context.rows + [-1] * len(targets),
            [False] * len(context.ids) + [True] * len(targets),
            self._constant(context),
        )

    def layout(self) -> tuple[list[int], list[int]]:
        return tokenise_pieces(self._tokenizer, self._conversation.parts(self._prompt, Slot((-1,), "x")))

    def _context(self, query: str | Sequence[int]) -> _Context:
        parts = self._conversation.parts(self._prompt, self._query(query))
        text = whole_text(parts)
        if self._template.kind == "plain":
            alone = [
                part if isinstance(part, Slot) else Slot(tuple(self._tokenizer.encode(part)), part) for part in parts
            ]
            return self._finished(*tokenise_pieces(self._tokenizer, alone), text, "", [])
        whole = tokenise_whole(self._tokenizer, parts)
        if whole is not None:
            return self._finished(*whole, text, text, whole[0])
        ids, rows = tokenise_pieces(self._tokenizer, parts)
        if isinstance(query, str):
            self._check_same(ids, text)
        last = parts[-1]
        if isinstance(last, Slot):
            return self._finished(ids, rows, text, "", [])
        count = len(tokenise_pieces(self._tokenizer, parts[:-1])[0])
        return self._finished(ids, rows, text, last, ids[count:])

    def _finished(self, ids: list[int], rows: list[int], text: str, tail: str, tail_ids: list[int]) -> _Context:
        """The context with BOS in front where a text template's tokenizer asks for it."""
        tokenizer = self._tokenizer
        if self._template.kind == "text" and tokenizer.adds_bos and tokenizer.bos_id is not None:
            bos = tokenizer.bos_id
            if ids[:1] != [bos]:
                ids, rows = [bos, *ids], [-1, *rows]
        self._check_vocabulary(ids)
        return _Context(ids, rows, text, tail, tail_ids)

    def _query(self, query: str | Sequence[int]) -> str | Slot:
        if isinstance(query, str):
            _check_unicode(query, "the query", DataError)
            if not query.strip():
                raise DataError("the query is empty: it needs at least one character that is not white space.")
            return query
        ids = tuple(check_ids(query, self._vocab_size, "the query", DataError))
        return Slot(ids, self._tokenizer.decode(ids, skip_special=False))

    def _targets(self, context: _Context, example: Example) -> list[int]:
        answer = self._conversation.answer
        if isinstance(example.target, str):
            text = answer.strip(example.target)
            if not text:
                raise DataError("the target is empty: it needs at least one token.")
            ids = self._answer_tokens(context, answer.before + text + answer.after, isinstance(example.query, str))
            self._check_vocabulary(ids)
        else:
            ids = check_ids(example.target, self._vocab_size, "the target", DataError)
            if answer.after and ids[-1] != answer.end:
                ids += continue_with(self._tokenizer, answer.after)
        if answer.end is not None and ids[-1] != answer.end:
            ids.append(answer.end)
        return ids

    def _answer_tokens(self, context: _Context, text: str, check: bool) -> list[int]:
        """The tokens of `text` after the context, whose own tokens stay as they are."""
        ids = _encode(self._tokenizer, text, "the target", DataError) if self._template.kind == "plain" else None
        if ids is not None:
            return ids
        _check_unicode(text, "the target", DataError)
        count = len(context.tail_ids)
        if context.tail:
            together = self._tokenizer.encode(context.tail + text)
            if together[:count] == context.tail_ids and len(together) > count:
                return together[count:]
        ids = continue_with(self._tokenizer, text)
        if check:
            self._check_same(context.ids + ids, context.text + text)
        return ids

    def _common_prefix(self) -> list[int]:
        """The leading tokens that two unlike queries share, up to the first prompt row."""
        if self._template.kind == "plain":
            return []
        one, other = self._context("x"), self._context("7")
        same = _common(one.ids, other.ids)
        return one.ids[: min([same, *(number for number, row in enumerate(one.rows) if row >= 0)])]

    def _constant(self, context: _Context) -> int:
        """Never more than what this very sequence has of the common prefix."""
        count = len(self._prefix)
        return count if context.ids[:count] == self._prefix else _common(context.ids, self._prefix)

    def _check_vocabulary(self, ids: list[int]) -> None:
        if ids and max(ids) >= self._vocab_size:
            raise PromptError(
                f"the tokenizer gives the token id {max(ids)}, the model has only {self._vocab_size} embedding rows."
            )

    def _check_length(self, context: int, targets: int | None) -> None:
        limit = self._max_position
        if targets is None and context > limit:
            raise ContextError(f"prompt and query have {context} tokens; the model's context holds {limit}.")
        if targets is not None and context + targets > limit:
            raise ContextError(
                f"the target would be cut by the context limit: {context} tokens before it and {targets} of its own "
                f"make {context + targets}, and the model's context holds {limit}."
            )

    def _check_same(self, ids: list[int], text: str) -> None:
        """Warns once where `ids` are not those of `text` tokenised at once."""
        if self._warned:
            return
        whole = self._tokenizer.encode(text)
        bare = ids[1:] if ids[:1] == [self._tokenizer.bos_id] and whole[:1] != ids[:1] else ids
        if bare != whole:
            first = max(0, _common(bare, whole) - 2)
            excerpt = self._tokenizer.decode(whole[first : first + 6], skip_special=False)
            self._warn("the ids differ from tokenising the whole text at once", excerpt)

    def _warn(self, what: str, excerpt: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self._name}: {what}, near {excerpt[:60]!r}.", TokenisationWarning, stacklevel=2)


_PLANS: PerObject[_Plan] = PerObject()


def _plan(model: ModelLike, template: Template, token_ids: tuple[int, ...], text: str) -> _Plan:
    return _PLANS.get(model, (template, token_ids, text), lambda: _Plan(model, template, token_ids, text))


def _plan_of(model: ModelLike, prompt: PromptLike) -> _Plan:
    return _plan(model, prompt.template, tuple(prompt.token_ids), prompt.text)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count
