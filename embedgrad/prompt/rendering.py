"""Renders a training sequence, or a query to be answered, as token ids in which the prompt rows are marked.

A training sequence consists of the *input*, which is everything before the answer, and the *targets*.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from embedgrad.data.example import Example
from embedgrad.prompt.conversation import Conversation
from embedgrad.prompt.template import Template
from embedgrad.prompt.tokenise import Slot, continue_with, tokenise_pieces, tokenise_whole, tokens_in_place, whole_text
from embedgrad.util.errors import ContextError, DataError, EmbedGradError, PromptError
from embedgrad.util.memo import PerObject

if TYPE_CHECKING:
    from embedgrad.model.tokenizer import Tokenizer


def too_long(query: str | Sequence[int]) -> str:
    """What to do about a query that is too long."""
    told = f"{query[:40]!r}…" if isinstance(query, str) else f"of {len(query)} token ids"
    return f"shorten the query {told}, or have queries cut (data.query_tokens)"


class TokenisationWarning(UserWarning):
    """The ids of a rendering differ from those of its text tokenised as a whole."""


class ModelLike(Protocol):
    """The part of a model that rendering needs. Of `config` it uses `vocab_size` and `max_position`."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def config(self) -> Any: ...

    @property
    def name(self) -> str: ...


class PromptLike(Protocol):
    """The part of a prompt that rendering needs."""

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def text(self) -> str: ...

    @property
    def template(self) -> Template: ...


@dataclass(frozen=True)
class Rendered:
    """A sequence of tokens.

    ids: token ids. Where the prompt stands, they are the ids that its anchor was taken from.
    prompt_rows: for each token the prompt row that it shows, or −1.
    target_mask: for each token whether it is a target, whose loss counts.
    constant_prefix: length of the prefix that all queries share with this template and prompt. It ends before the first
        prompt row.
    """

    ids: list[int]
    prompt_rows: list[int]
    target_mask: list[bool]
    constant_prefix: int


def render(model: ModelLike, prompt: PromptLike, example: Example, where: str = "") -> Rendered:
    """`example` as a training sequence: the input (exactly the result of `render_query`), then the targets.

    The targets are the answer's tokens and the token that ends the answer. `Template.plain()` and
    `Template.text(end=False)` have no such token, and it is not added where the answer already ends with it. Where the
    chat template trims an assistant's message, an answer that is given as text is trimmed in the same way.
    where: begins the error messages, such as "train.jsonl, line 3". Raises PromptError, DataError, ContextError,
    TemplateError.
    """
    try:
        return _plan_of(model, prompt).example(example)
    except EmbedGradError as error:
        _raise_at(where, error)


def render_query(model: ModelLike, prompt: PromptLike, query: str | Sequence[int], where: str = "") -> Rendered:
    """The input of `query`: all tokens before its answer. Raises the same errors as `render`."""
    try:
        return _plan_of(model, prompt).query(query)
    except EmbedGradError as error:
        _raise_at(where, error)


def end_token(model: ModelLike, prompt: PromptLike) -> int | None:
    """The token that ends an answer with this prompt's template; None where there is no such token."""
    return _plan_of(model, prompt).end_token


def answer_tokens(model: ModelLike, prompt: PromptLike, text: str) -> list[int]:
    """The tokens of `text` as an answer with this prompt's template, without the end token.

    Raises the same errors as `render`.
    """
    start = len(render_query(model, prompt, "x").ids)
    ids = render(model, prompt, Example("x", text)).ids[start:]
    end = end_token(model, prompt)
    return ids[: ids.index(end)] if end in ids else ids


def layout(model: ModelLike, template: Template, token_ids: Sequence[int], text: str) -> tuple[list[int], list[int]]:
    """(ids, for each the prompt row or −1) of the template's input, in which the query is one token with id −1."""
    return _plan(model, template, tuple(token_ids), text).layout()


def prompt_tokens(model: ModelLike, template: Template, text: str) -> list[int]:
    """The tokens of `text` as a prompt.

    Normally they are the tokens of `text` alone. A tokenizer that puts a space before every text splits `text`
    differently inside the template. If the tokens there are the same in all of the prompt's slots and begin and end
    with the slot, these are taken, because the model has seen them in training. Raises PromptError for an empty text.
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
    """`ids` as a list of at least one int in [0, vocab_size). Otherwise raises `error`; `what` names the ids in it."""
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
class _Input:
    """Everything before the targets.

    prompt_rows: for each of `ids` the prompt row or −1. text: the text of `ids`. tail: the last piece of the text, with
    which the answer is tokenised. tail_ids: its tokens, the last ones of `ids`. Both are empty where the answer is
    tokenised alone.
    """

    ids: list[int]
    prompt_rows: list[int]
    text: str
    tail: str
    tail_ids: list[int]


class _Plan:
    """Renders sequences with one prompt, template and model."""

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
        self._warned = True  # no warnings about the stand-in queries of the next line
        self._prefix = self._shared_prefix()
        self._warned = False
        if self._conversation.changes_prompt(text):
            self._warn("the chat template changes the prompt's text (it trims it, for instance)", text)

    @property
    def end_token(self) -> int | None:
        return self._conversation.answer.end

    def query(self, query: str | Sequence[int]) -> Rendered:
        given = self._input(query)
        self._check_length(query, len(given.ids), None)
        return Rendered(given.ids, given.prompt_rows, [False] * len(given.ids), self._prefix_length(given))

    def example(self, example: Example) -> Rendered:
        given = self._input(example.query)
        targets = self._targets(given, example)
        self._check_length(example.query, len(given.ids), len(targets))
        return Rendered(
            given.ids + targets,
            given.prompt_rows + [-1] * len(targets),
            [False] * len(given.ids) + [True] * len(targets),
            self._prefix_length(given),
        )

    def layout(self) -> tuple[list[int], list[int]]:
        return tokenise_pieces(self._tokenizer, self._conversation.parts(self._prompt, Slot((-1,), "x")))

    def _input(self, query: str | Sequence[int]) -> _Input:
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
        ids, prompt_rows = tokenise_pieces(self._tokenizer, parts)
        if isinstance(query, str):
            self._check_same(ids, text)
        last = parts[-1]
        if isinstance(last, Slot):
            return self._finished(ids, prompt_rows, text, "", [])
        count = len(tokenise_pieces(self._tokenizer, parts[:-1])[0])
        return self._finished(ids, prompt_rows, text, last, ids[count:])

    def _finished(self, ids: list[int], prompt_rows: list[int], text: str, tail: str, tail_ids: list[int]) -> _Input:
        """The input, with a BOS token before the text of a text template if the tokenizer adds one."""
        tokenizer = self._tokenizer
        if self._template.kind == "text" and tokenizer.adds_bos and tokenizer.bos_id is not None:
            bos = tokenizer.bos_id
            if ids[:1] != [bos]:
                ids, prompt_rows = [bos, *ids], [-1, *prompt_rows]
        self._check_vocabulary(ids)
        return _Input(ids, prompt_rows, text, tail, tail_ids)

    def _query(self, query: str | Sequence[int]) -> str | Slot:
        if isinstance(query, str):
            _check_unicode(query, "the query", DataError)
            if not query.strip():
                raise DataError("the query is empty: it needs at least one character that is not white space.")
            return query
        ids = tuple(check_ids(query, self._vocab_size, "the query", DataError))
        return Slot(ids, self._tokenizer.decode(ids, skip_special=False))

    def _targets(self, given: _Input, example: Example) -> list[int]:
        answer = self._conversation.answer
        if isinstance(example.target, str):
            text = answer.strip(example.target)
            if not text:
                raise DataError("the target is empty: it needs at least one token.")
            ids = self._answer_tokens(given, answer.before + text + answer.after, isinstance(example.query, str))
            self._check_vocabulary(ids)
        else:
            ids = check_ids(example.target, self._vocab_size, "the target", DataError)
            if answer.after and ids[-1] != answer.end:
                ids += continue_with(self._tokenizer, answer.after)
        if answer.end is not None and ids[-1] != answer.end:
            ids.append(answer.end)
        return ids

    def _answer_tokens(self, given: _Input, text: str, check: bool) -> list[int]:
        """The tokens of `text` after the input, whose tokens do not change. check: compare with the whole text."""
        ids = _encode(self._tokenizer, text, "the target", DataError) if self._template.kind == "plain" else None
        if ids is not None:
            return ids
        _check_unicode(text, "the target", DataError)
        count = len(given.tail_ids)
        if given.tail:
            together = self._tokenizer.encode(given.tail + text)
            if together[:count] == given.tail_ids and len(together) > count:
                return together[count:]
        ids = continue_with(self._tokenizer, text)
        if check:
            self._check_same(given.ids + ids, given.text + text)
        return ids

    def _shared_prefix(self) -> list[int]:
        """The leading tokens that two different queries share, up to the first prompt row."""
        if self._template.kind == "plain":
            return []
        one, other = self._input("x"), self._input("7")
        same = _common_length(one.ids, other.ids)
        return one.ids[: min([same, *(number for number, row in enumerate(one.prompt_rows) if row >= 0)])]

    def _prefix_length(self, given: _Input) -> int:
        """Number of leading tokens that this input has in common with the shared prefix."""
        count = len(self._prefix)
        return count if given.ids[:count] == self._prefix else _common_length(given.ids, self._prefix)

    def _check_vocabulary(self, ids: list[int]) -> None:
        if ids and max(ids) >= self._vocab_size:
            raise PromptError(
                f"the tokenizer gives the token id {max(ids)}, the model has only {self._vocab_size} embedding rows."
            )

    def _check_length(self, query: str | Sequence[int], before: int, targets: int | None) -> None:
        """Raises ContextError where the `before` input tokens and the targets exceed the model's context length."""
        limit = self._max_position
        if targets is None and before > limit:
            raise ContextError(
                f"prompt and query have {before} tokens; the model's context holds {limit}: {too_long(query)}."
            )
        if targets is not None and before + targets > limit:
            raise ContextError(
                f"the target would be cut by the context limit: {before} tokens before it and {targets} of its own "
                f"make {before + targets}, and the model's context holds {limit}: {too_long(query)}, or "
                f"leave out long targets (data.target_tokens)."
            )

    def _check_same(self, ids: list[int], text: str) -> None:
        """Warns once where `ids` are not those of `text` tokenised as a whole."""
        if self._warned:
            return
        whole = self._tokenizer.encode(text)
        bare = ids[1:] if ids[:1] == [self._tokenizer.bos_id] and whole[:1] != ids[:1] else ids
        if bare != whole:
            first = max(0, _common_length(bare, whole) - 2)
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


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of leading items that are equal."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count
