"""What a server serves: the bare model and named prompts, and how a request becomes tokens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embedgrad.engine.model import Model
from embedgrad.exports.chat_template import VARIABLE, Placed, chat_template
from embedgrad.generation.constrained import ForcedChoice
from embedgrad.generation.generate import common_prefix, forced_choice, limits_of
from embedgrad.generation.slots import Limits
from embedgrad.prompt.conversation import free_marks
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import Rendered, TokenisationWarning, check_ids, end_token, render_query
from embedgrad.prompt.sandbox import compile_chat_template
from embedgrad.prompt.tokenise import Part, Slot, tokenise_pieces, tokenise_whole
from embedgrad.util.errors import ContextError, DataError, TemplateError
from embedgrad.util.memo import PerObject

Messages = Sequence[Mapping[str, str]]
_CHOICES: PerObject[ForcedChoice | None] = PerObject(limit=64)  # clients send the same list again and again
_PLAIN_QUERIES = ("x", "7")  # what two conversations have in common is the prefix of most


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model that clients can name: the bare model, or the model with a prompt."""

    model: Model
    name: str
    prompt: SoftPrompt | None

    @property
    def embeddings(self) -> Tensor:
        """The prompt rows [k, d]; one row of zeros, which no position shows, for the bare model."""
        rows = torch.zeros(1, self.model.config.hidden_size) if self.prompt is None else self.prompt.embeddings
        return rows.to(self.model.device)

    @property
    def end(self) -> int | None:
        """The token that ends an answer, besides the model's own end tokens."""
        return None if self.prompt is None else end_token(self.model, self.prompt)

    @property
    def limits(self) -> Limits:
        """The tokens that end an answer, and the context's length."""
        return limits_of(self.model, self.end)

    def chat(self, messages: Messages, variables: Mapping[str, Any] | None = None) -> Rendered:
        """The conversation's tokens. One message of the user gives those of `render_query`.

        Raises TemplateError, DataError, ContextError.
        """
        alone = len(messages) == 1 and messages[0]["role"] == "user"
        if self.prompt is not None and alone and not variables:
            return self._query(messages[0]["content"])
        if self.prompt is not None and self.prompt.template.kind != "chat":
            raise DataError(f"the prompt {self.name} stands in plain text and takes one message of the user.")
        return self._room(self._conversation(messages, variables or {}))

    def complete(self, text: str | Sequence[int]) -> Rendered:
        """The tokens of a completion's prompt: a query of the prompt, or plain text for the bare model.

        Raises DataError, ContextError, TemplateError.
        """
        if self.prompt is not None:
            return self._query(text)
        tokenizer = self.model.tokenizer
        if isinstance(text, str):
            if not text:
                raise DataError("the prompt is empty: it needs at least one character.")
            ids = tokenizer.encode(text)
            bos = tokenizer.bos_id
            ids = [bos, *ids] if tokenizer.adds_bos and bos is not None and ids[:1] != [bos] else ids
        else:
            ids = check_ids(text, self.model.config.vocab_size, "the prompt", DataError)
        return self._room(_plain(ids))

    def choice(self, texts: Sequence[str]) -> ForcedChoice | None:
        """The trie of texts of which an answer must be one; None without texts. Raises DataError, ConfigError."""
        return _CHOICES.get(self, tuple(texts), lambda: forced_choice(self.model, self.prompt, texts, self.end))

    def prefix(self) -> tuple[Rendered, int]:
        """(a conversation, how many of its tokens most conversations with this model begin with)."""
        try:
            one, other = (self.chat([{"role": "user", "content": query}]) for query in _PLAIN_QUERIES)
        except (TemplateError, DataError):  # a bare model without a chat template
            return _plain([0]), 0
        return one, common_prefix([one, other])

    def _query(self, query: str | Sequence[int]) -> Rendered:
        assert self.prompt is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TokenisationWarning)
            return self._room(render_query(self.model, self.prompt, query))

    def _room(self, rendered: Rendered) -> Rendered:
        limit = self.model.config.max_position
        if len(rendered.ids) >= limit:
            raise ContextError(
                f"the request has {len(rendered.ids)} tokens: no room for an answer is left in the model's context of "
                f"{self.model.config.context_told}; shorten it."
            )
        return rendered

    def _conversation(self, messages: Messages, variables: Mapping[str, Any]) -> Rendered:
        """A conversation of any number of messages, rendered as an exported copy renders it.

        Texts of control tokens within the messages are ordinary text, as in a query.
        """
        controls, template = self.model.tokenizer.controls, None if self.prompt is None else self.prompt.template
        contents = "".join(message["content"] for message in messages)
        held = [] if template is not None and template.control_tokens else controls.within(contents)
        sources = (self.model.tokenizer.chat_template or "") + ("" if template is None else template.source_text())
        mark, *others = free_marks(contents + sources, 1 + len(held))
        if not held:
            return self.tokens(self.text(messages, mark, variables), mark)
        places = dict(zip(held, others, strict=True))
        marked = [{**each, "content": controls.replaced(each["content"], places.__getitem__)} for each in messages]
        text = self.model.tokenizer.literal.escape_around(self.text(marked, mark, variables), places)
        return self.tokens(text, mark, literal=True)

    def text(
        self,
        messages: Messages,
        mark: str,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation, in which `mark` stands for the prompt. Raises TemplateError."""
        tokenizer, prompt, values = self.model.tokenizer, self.prompt, dict(variables or {})
        source = tokenizer.chat_template
        if prompt is not None:
            bos = tokenizer.token(tokenizer.bos_id) if tokenizer.adds_bos and tokenizer.bos_id is not None else ""
            source = chat_template([Placed(self.name, prompt.template, mark)], source, bos)
            if values.get(VARIABLE, self.name) != self.name:
                raise DataError(f"{VARIABLE} chooses a prompt in an exported copy; here the model's name does.")
            values[VARIABLE] = self.name
        if source is None:
            raise TemplateError("the model has no chat template; use completions, or a prompt that brings one.")
        return compile_chat_template(source).render(
            messages, tokenizer.special, add_generation_prompt=add_generation_prompt, variables=values
        )

    def tokens(self, text: str, mark: str, literal: bool = False) -> Rendered:
        """The tokens of a text in which `mark` stands for the prompt. literal: of a text of `Tokenizer.literal`."""
        tokenizer, prompt = self.model.tokenizer, self.prompt
        encoder = tokenizer.literal if literal else tokenizer
        if prompt is None:
            return _plain(encoder.encode(text))
        slot = Slot(tuple(prompt.token_ids), prompt.text, True)
        parts: list[Part] = []
        for number, piece in enumerate(text.split(mark)):
            parts += [slot] if number else []
            parts += [piece] if piece else []
        ids, rows = tokenise_whole(encoder, parts) or tokenise_pieces(encoder, parts)
        return Rendered(ids, rows, [False] * len(ids), 0)


def _plain(ids: list[int]) -> Rendered:
    return Rendered(ids, [-1] * len(ids), [False] * len(ids), 0)
