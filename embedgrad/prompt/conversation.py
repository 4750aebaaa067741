"""A template with a tokenizer: renders conversations as text with slots, and finds what surrounds an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from embedgrad.prompt.sandbox import clock, compile_chat_template, today
from embedgrad.prompt.template import DATE, Template
from embedgrad.prompt.tokenise import Part, Slot
from embedgrad.util.errors import DataError, TemplateError

if TYPE_CHECKING:
    from embedgrad.model.tokenizer import Tokenizer

_MARKS = range(0xE000, 0xF900)  # Unicode's private-use characters in the basic plane
_STRIPPED = (" ", "\n", "\t", "\r")


@dataclass(frozen=True)
class Answer:
    """What the conversation holds around an answer: `before` + answer + `after`, then the token `end` (None: no token).

    strip_left, strip_right: the characters that the chat template strips from the answer's two ends; "" for none, None
    for all white space.
    """

    before: str = ""
    after: str = ""
    end: int | None = None
    strip_left: str | None = ""
    strip_right: str | None = ""

    def strip(self, text: str) -> str:
        """The answer as the chat template renders it."""
        if self.strip_left != "":
            text = text.lstrip(self.strip_left)
        return text.rstrip(self.strip_right) if self.strip_right != "" else text


def dated(template: Template, tokenizer: Tokenizer, date: str | None = None) -> Template:
    """`template` with `date` among its variables, where its chat template asks for the date and has none yet.

    date: None: today's.
    """
    source = template.chat_template if template.chat_template is not None else tokenizer.chat_template
    asks = template.kind == "chat" and source is not None and DATE in source
    return template.on(date or today()) if asks and template.date is None else template


class Conversation:
    """Renders a template with a tokenizer's chat template and special tokens. Raises TemplateError."""

    def __init__(self, tokenizer: Tokenizer, template: Template, model_name: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._source = template.chat_template if template.chat_template is not None else tokenizer.chat_template
        self._special = dict(tokenizer.special)
        self._variables: dict[str, Any] = json.loads(template.variables)
        if DATE in self._variables:
            self._variables[DATE] = clock(self._variables[DATE])
        if template.kind == "chat" and self._source is None:
            raise TemplateError(
                f"the model {model_name} has no chat template; give one, or use Template.text or Template.plain."
            )
        self._used = template.source_text() + (self._source or "")

    def text(self, prompt: str, query: str, answer: str | None = None) -> str:
        """The conversation with `prompt` and `query` in their slots.

        It ends where the answer begins. For a chat template with an `answer` it ends after the assistant's turn.
        """
        filled = self._template.fill(prompt, query)
        if isinstance(filled, str):
            return filled
        if answer is not None:
            filled.append({"role": "assistant", "content": answer})
        assert self._source is not None
        return compile_chat_template(self._source).render(
            filled, self._special, add_generation_prompt=answer is None, variables=self._variables
        )

    def literal_parts(self, prompt: Slot, query: str) -> list[Part]:
        """`parts` for `Tokenizer.literal`: control tokens of the template are stand-ins, those of `query` are text.

        While the chat template is rendered, a mark holds the place of each control token in the query.
        """
        if self._template.kind == "plain":
            return [prompt, query]
        tokenizer = self._tokenizer
        found = tokenizer.controls.within(query)
        places = dict(zip(found, free_marks(query + self._used, len(found) + 2)[2:], strict=True))
        return [
            tokenizer.literal.escape_around(part, places) if isinstance(part, str) else part
            for part in self.parts(prompt, tokenizer.controls.replaced(query, places.__getitem__))
        ]

    def parts(self, prompt: Slot, query: str | Slot) -> list[Part]:
        """Everything before the answer: texts, the prompt's slots and, if the query is a `Slot`, the query's slots.

        Raises TemplateError where the chat template drops a message with a slot.
        """
        prompt_mark, query_mark = self._marks("" if isinstance(query, Slot) else query)
        if self._template.kind == "plain":
            return [prompt, query]
        text = self.text(prompt_mark, query_mark if isinstance(query, Slot) else query)
        parts: list[Part] = []
        for number, piece in enumerate(text.split(prompt_mark)):
            if number:
                parts.append(prompt)
            if isinstance(query, str):
                parts.append(piece)
                continue
            for inner, rest in enumerate(piece.split(query_mark)):
                parts.extend([query, rest] if inner else [rest])
        shown = [(query, "{query}")] + ([(prompt, "{prompt}")] if self._template.shows_prompt else [])
        for slot, name in shown:
            if isinstance(slot, Slot) and slot not in parts:
                raise TemplateError(f"the chat template drops the message that holds {name}.")
        return [part for part in parts if part != ""]

    def changes_prompt(self, text: str) -> bool:
        """Whether the chat template changes `text` in the prompt's slots, for instance by trimming it."""
        mark, query = self._marks(text)
        return self._template.kind == "chat" and self.text(text, query) != self.text(mark, query).replace(mark, text)

    def _marks(self, text: str) -> tuple[str, str]:
        """Two characters that do not occur in `text` or in the template. Raises DataError where none are left."""
        first, second = free_marks(text + self._used, 2)
        return first, second

    @cached_property
    def answer(self) -> Answer:
        """What surrounds the answer. It is read from a rendering with a mark as the assistant's message.

        The end token is the first special token after the mark. White space between the chat template's generation
        prompt and the mark belongs to the answer. Other text there, such as an empty thinking block, does not, because
        a rendering for generation does not contain it. Where the mark does not occur exactly once, the end-of-text
        token ends the answer.
        """
        if self._template.kind == "plain" or (self._template.kind == "text" and not self._template.end):
            return Answer()
        if self._template.kind == "text":
            return Answer(end=self._end_of_text())
        mark, query = self._marks("")
        try:
            full = self.text("p", query, mark)
        except TemplateError:
            return Answer(end=self._end_of_text())
        if full.count(mark) != 1:
            return Answer(end=self._end_of_text())
        head, tail = full.split(mark)
        # What stands before the query may differ: some templates show the system's text in the last turn only.
        follows, generation_prompt = head.rpartition(query)[2], self.text("p", query).rpartition(query)[2]
        between = follows[len(generation_prompt) :] if follows.startswith(generation_prompt) else ""
        after, end = self._turn_end(tail)
        left, right = self._stripped(mark, query, head, tail)
        return Answer(between if between.isspace() else "", after, end, left, right)

    def _turn_end(self, tail: str) -> tuple[str, int]:
        """(text before the first special token of `tail`, its id); without a special token "" and the end of text."""
        tokenizer = self._tokenizer
        for token in tokenizer.encode(tail):
            text = tokenizer.decode([token], skip_special=False)
            if text and text in tail and self._is_special(token):
                return tail[: tail.index(text)], token
        return "", self._end_of_text()

    def _is_special(self, token: int) -> bool:
        tokenizer = self._tokenizer
        if token in tokenizer.eos_ids or tokenizer.token(token) in self._special.values():
            return True
        return not tokenizer.decode([token]) and bool(tokenizer.decode([token], skip_special=False))

    def _end_of_text(self) -> int:
        tokenizer = self._tokenizer
        for token in tokenizer.eos_ids:
            if tokenizer.token(token) == self._special.get("eos_token"):
                return token
        if tokenizer.eos_ids:
            return tokenizer.eos_ids[0]
        raise TemplateError("the tokenizer has no end-of-text token to end answers; use end=False or Template.plain.")

    def _stripped(self, mark: str, query: str, head: str, tail: str) -> tuple[str | None, str | None]:
        """`strip_left` and `strip_right` of `Answer`, found by trying each character of _STRIPPED around the mark."""
        left = right = ""
        for character in _STRIPPED:
            before, found, after = self.text("p", query, character + mark + character).partition(mark)
            left += character if found and before == head else ""
            right += character if found and after == tail else ""
        everything = len(_STRIPPED)
        return (None if len(left) == everything else left), (None if len(right) == everything else right)


def free_marks(used: str, count: int) -> list[str]:
    """`count` private-use characters that `used` does not have. Raises DataError where too few are left."""
    taken = set() if used.isascii() else set(used)
    free = list(islice((mark for mark in map(chr, _MARKS) if mark not in taken), count))
    if len(free) < count:
        raise DataError("the text uses every private-use character; none is left to mark the prompt's place.")
    return free
