"""Renders a training sequence, or a query to be answered, as token ids in which the prompt rows are marked.

A training sequence consists of the *input*, which is everything before the answer, and the *targets*.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from embedgrad.data.example import Example
from embedgrad.prompt.conversation import Conversation
from embedgrad.prompt.template import Template
from embedgrad.prompt.tokenise import (
    Encoder,
    Slot,
    continue_with,
    tokenise_pieces,
    tokenise_whole,
    tokens_in_place,
    whole_text,
)
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


class ControlTokenWarning(UserWarning):
    """A query or target holds the text of a control token, which becomes ordinary text."""


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
    chat template trims an assistant's message, an answer that is given as text is trimmed in the same way. The text of
    any other control token in query or target is ordinary text, with one ControlTokenWarning for a prompt and model,
    unless the template has `control_tokens`.
    where: begins the error messages, such as "train.jsonl, line 3". Raises PromptError, DataError, ContextError,
    TemplateError.
    """
    try:
        return _plan_of(model, prompt).example(example, where)
    except EmbedGradError as error:
        _raise_at(where, error)


def render_query(model: ModelLike, prompt: PromptLike, query: str | Sequence[int], where: str = "") -> Rendered:
    """The input of `query`: all tokens before its answer. Raises the same errors as `render`."""
    try:
        return _plan_of(model, prompt).query(query, where)
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
    held = [] if template.control_tokens else tokenizer.controls.within(text)
    if held:
        raise PromptError(
            f"the prompt holds {held[0]!r}, a control token of {model.name}; write it in another way, or give the "
            f"template control_tokens: true."
        )
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
    tokenised alone. literal: text and tail are those of `Tokenizer.literal`, with stand-ins for control tokens.
    """

    ids: list[int]
    prompt_rows: list[int]
    text: str
    tail: str
    tail_ids: list[int]
    literal: bool = False


class _Plan:
    """Renders sequences with one prompt, template and model."""

    def __init__(self, model: ModelLike, template: Template, token_ids: tuple[int, ...], text: str) -> None:
        self._tokenizer = model.tokenizer
        self._vocab_size = int(model.config.vocab_size)
        self._max_position = int(model.config.max_position)
        self._context = getattr(model.config, "context_told", str(self._max_position))
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
        self._warned_of_controls = False
        if self._conversation.changes_prompt(text):
            self._warn("the chat template changes the prompt's text (it trims it, for instance)", text)

    @property
    def end_token(self) -> int | None:
        return self._conversation.answer.end

    def query(self, query: str | Sequence[int], where: str = "") -> Rendered:
        given = self._input(query, where)
        self._check_length(query, len(given.ids), None)
        return Rendered(given.ids, given.prompt_rows, [False] * len(given.ids), self._prefix_length(given))

    def example(self, example: Example, where: str = "") -> Rendered:
        given = self._input(example.query, where)
        targets = self._targets(given, example, where)
        self._check_length(example.query, len(given.ids), len(targets))
        return Rendered(
            given.ids + targets,
            given.prompt_rows + [-1] * len(targets),
            [False] * len(given.ids) + [True] * len(targets),
            self._prefix_length(given),
        )

    def layout(self) -> tuple[list[int], list[int]]:
        return tokenise_pieces(self._tokenizer, self._conversation.parts(self._prompt, Slot((-1,), "x")))

    def _input(self, query: str | Sequence[int], where: str = "") -> _Input:
        slot = self._query(query)
        literal = isinstance(slot, str) and self._holds_controls(slot, "query", where)
        encoder = self._encoder(literal)
        if literal:
            parts = self._conversation.literal_parts(self._prompt, str(slot))
        else:
            parts = self._conversation.parts(self._prompt, slot)
        text = whole_text(parts)
        if self._template.kind == "plain":
            alone = [part if isinstance(part, Slot) else Slot(tuple(encoder.encode(part)), part) for part in parts]
            return self._finished(*tokenise_pieces(encoder, alone), text, "", [], literal)
        whole = tokenise_whole(encoder, parts)
        if whole is not None:
            return self._finished(*whole, text, text, whole[0], literal)
        ids, prompt_rows = tokenise_pieces(encoder, parts)
        if isinstance(query, str):
            self._check_same(encoder, ids, text)
        last = parts[-1]
        if isinstance(last, Slot):
            return self._finished(ids, prompt_rows, text, "", [], literal)
        count = len(tokenise_pieces(encoder, parts[:-1])[0])
        return self._finished(ids, prompt_rows, text, last, ids[count:], literal)

    def _encoder(self, literal: bool) -> Encoder:
        return self._tokenizer.literal if literal else self._tokenizer

    def _holds_controls(self, text: str, what: str, where: str) -> bool:
        """Whether `text` holds texts of control tokens that are to be ordinary text. Warns of the first."""
        found = [] if self._template.control_tokens else self._tokenizer.controls.within(text)
        if found and not self._warned_of_controls:
            self._warned_of_controls = True
            place = f"{where}: the {what}" if where else f"the {what} {text[:40]!r}…"
            warnings.warn(
                f"{place} holds {found[0]!r}, a control token of {self._name}; here and in other examples it is "
                f"tokenised as ordinary text (a template's control_tokens: true keeps the token).",
                ControlTokenWarning,
                stacklevel=2,
            )
        return bool(found)

    def _finished(
        self, ids: list[int], prompt_rows: list[int], text: str, tail: str, tail_ids: list[int], literal: bool
    ) -> _Input:
        """The input, with a BOS token before the text of a text template if the tokenizer adds one."""
        tokenizer = self._tokenizer
        if self._template.kind == "text" and tokenizer.adds_bos and tokenizer.bos_id is not None:
            bos = tokenizer.bos_id
            if ids[:1] != [bos]:
                ids, prompt_rows = [bos, *ids], [-1, *prompt_rows]
        self._check_vocabulary(ids)
        return _Input(ids, prompt_rows, text, tail, tail_ids, literal)

    def _query(self, query: str | Sequence[int]) -> str | Slot:
        if isinstance(query, str):
            _check_unicode(query, "the query", DataError)
            if not query.strip():
                raise DataError("the query is empty: it needs at least one character that is not white space.")
            return query
        ids = tuple(check_ids(query, self._vocab_size, "the query", DataError))
        return Slot(ids, self._tokenizer.decode(ids, skip_special=False))

    def _targets(self, given: _Input, example: Example, where: str) -> list[int]:
        answer = self._conversation.answer
        if isinstance(example.target, str):
            text = answer.strip(example.target)
            if not text:
                raise DataError("the target is empty: it needs at least one token.")
            literal = self._holds_controls(self._without_end(text), "target", where)
            check = isinstance(example.query, str)
            if literal or given.literal:
                ids = self._literal_answer_tokens(given, self._without_end(text), check)
            else:
                ids = self._answer_tokens(self._tokenizer, given, answer.before + text + answer.after, check)
        else:
            ids = check_ids(example.target, self._vocab_size, "the target", DataError)
            if answer.after and ids[-1] != answer.end:
                ids += continue_with(self._tokenizer, answer.after)
        if answer.end is not None and (not ids or ids[-1] != answer.end):
            ids.append(answer.end)
        self._check_vocabulary(ids)
        return ids

    def _without_end(self, text: str) -> str:
        """`text` without the text of the token that ends answers, if it ends with it: that one is meant."""
        end = self._conversation.answer.end
        return text if end is None else text.removesuffix(self._tokenizer.token(end))

    def _literal_answer_tokens(self, given: _Input, text: str, check: bool) -> list[int]:
        """The tokens of `text` after the input, where query or target hold texts of control tokens."""
        answer, literal = self._conversation.answer, self._tokenizer.literal
        if not given.literal:
            given = replace(given, text=literal.escape(given.text), tail=literal.escape(given.tail))
        around = literal.escape(answer.before) + text + literal.escape(answer.after)
        return self._answer_tokens(literal, given, around, check) if around else []

    def _answer_tokens(self, encoder: Encoder, given: _Input, text: str, check: bool) -> list[int]:
        """The tokens of `text` after the input, whose tokens do not change. check: compare with the whole text."""
        _check_unicode(text, "the target", DataError)
        if self._template.kind == "plain":
            return encoder.encode(text)
        count = len(given.tail_ids)
        if given.tail:
            together = encoder.encode(given.tail + text)
            if together[:count] == given.tail_ids and len(together) > count:
                return together[count:]
        ids = continue_with(encoder, text)
        if check:
            self._check_same(encoder, given.ids + ids, given.text + text)
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
                f"prompt and query have {before} tokens; the model's context holds {self._context}: {too_long(query)}."
            )
        if targets is not None and before + targets > limit:
            raise ContextError(
                f"the target would be cut by the context limit: {before} tokens before it and {targets} of its own "
                f"make {before + targets}, and the model's context holds {self._context}: {too_long(query)}, or "
                f"leave out long targets (data.target_tokens)."
            )

    def _check_same(self, encoder: Encoder, ids: list[int], text: str) -> None:
        """Warns once where `ids` are not those of `text` tokenised as a whole."""
        if self._warned:
            return
        whole = encoder.encode(text)
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
