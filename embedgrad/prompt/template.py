"""Where prompt, query and answer stand: chat messages or plain text with the slots `{prompt}` and `{query}`.

Only these two strings are slots; all other braces (JSON, LaTeX) are text. The answer always follows after the rendered
template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from embedgrad.prompt.sandbox import compile_chat_template
from embedgrad.util.errors import TemplateError
from embedgrad.util.shown import short

PROMPT, QUERY = "{prompt}", "{query}"
ROLES = ("system", "developer", "user", "assistant", "tool")
_SLOTS = re.compile(r"\{prompt\}|\{query\}")


@dataclass(frozen=True)
class Template:
    """A template. Made by `Template.chat`, `Template.text` or `Template.plain`; immutable and hashable."""

    kind: str
    messages: tuple[tuple[str, str], ...] = ()
    chat_template: str | None = None
    variables: str = "{}"
    body: str = ""
    end: bool = False

    @classmethod
    def chat(
        cls,
        messages: Sequence[Mapping[str, str]],
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Template:
        """Chat messages (`role`, `content`), rendered with a Jinja chat template.

        messages: `{prompt}` and `{query}` each occur at least once in the content of a message. The last message is not
            the assistant's, because the answer follows it.
        chat_template: Jinja source; None: the model's.
        variables: further variables of the chat template, such as `{"enable_thinking": False}`.
        Raises TemplateError.
        """
        pairs = tuple(_message(message, index) for index, message in enumerate(_as_list(messages)))
        if not pairs:
            raise TemplateError("a chat template needs at least one message.")
        if pairs[-1][0] == "assistant":
            raise TemplateError(
                "the last message must not be the assistant's: the target is the assistant's answer that follows it."
            )
        _require_slots(" ".join(content for _, content in pairs), "the messages")
        if chat_template is not None:
            if not isinstance(chat_template, str):
                raise TemplateError(f"chat_template must be text (Jinja), not {type(chat_template).__name__}.")
            compile_chat_template(chat_template)
        return cls("chat", messages=pairs, chat_template=chat_template, variables=_variables(variables))

    @classmethod
    def text(cls, body: str, end: bool = True) -> Template:
        """Plain text for models without a chat template. The answer follows directly after `body`.

        One BOS token comes first if the tokenizer adds one. With end=True the end-of-text token is the last target.
        Raises TemplateError where a slot is missing.
        """
        if not isinstance(body, str):
            raise TemplateError(f"a text template must be text, not {type(body).__name__}.")
        if not isinstance(end, bool):
            raise TemplateError(f"`end` of a text template must be true or false, not {short(end)}.")
        _require_slots(body, "the text template")
        return cls("text", body=body, end=end)

    @classmethod
    def plain(cls) -> Template:
        """The tokens of prompt, query and target one after another, with nothing between them, no BOS and no end
        token."""
        return cls("plain")

    @property
    def shows_prompt(self) -> bool:
        """Whether the template has a slot for the prompt; False only for results of `without_prompt`."""
        return self.kind == "plain" or PROMPT in self.body or any(PROMPT in content for _, content in self.messages)

    def without_prompt(self) -> Template:
        """A copy without the prompt's slot, and without a message that holds nothing else.

        It is a control for comparisons. `from_json` refuses such a template.
        """
        if self.kind == "plain":
            return replace(self, kind="text", body=QUERY)
        if self.kind == "text":
            return replace(self, body=self.body.replace(PROMPT, "").lstrip())
        messages = [(role, content.replace(PROMPT, "").strip()) for role, content in self.messages]
        return replace(self, messages=tuple(message for message in messages if message[1]))

    def to_json(self) -> str:
        """The template as a JSON object; `from_json` is its inverse."""
        fields: dict[str, Any] = {"kind": self.kind}
        if self.kind == "chat":
            fields["messages"] = [{"role": role, "content": content} for role, content in self.messages]
            fields["chat_template"] = self.chat_template
            fields["variables"] = json.loads(self.variables)
        elif self.kind == "text":
            fields |= {"text": self.body, "end": self.end}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, source: str | Mapping[str, Any]) -> Template:
        """The template of a JSON object as `to_json` writes it, or of the same mapping. Raises TemplateError."""
        fields = source
        if isinstance(source, str):
            try:
                fields = json.loads(source)
            except (ValueError, RecursionError) as error:
                raise TemplateError(f"the template is not valid JSON: {error}.") from error
        if not isinstance(fields, Mapping):
            raise TemplateError(f"a template must be an object with a kind, not {type(fields).__name__}.")
        allowed = {
            "chat": {"kind", "messages", "chat_template", "variables"},
            "text": {"kind", "text", "end"},
            "plain": {"kind"},
        }
        kind = fields.get("kind", "chat" if "messages" in fields else None)
        if not isinstance(kind, str) or kind not in allowed:
            raise TemplateError(f"a template's kind must be chat, text or plain, not {short(kind)}.")
        unknown = sorted(map(str, set(fields) - allowed[kind]))
        if unknown:
            known = ", ".join(sorted(allowed[kind]))
            raise TemplateError(f"a {kind} template has no field {short(unknown[0])}; its fields are {known}.")
        if kind == "chat":
            return cls.chat(fields.get("messages", ()), fields.get("chat_template"), fields.get("variables"))
        if kind == "text":
            return cls.text(fields.get("text", ""), fields.get("end", True))
        return cls.plain()

    def fill(self, prompt: str, query: str) -> list[dict[str, str]] | str:
        """The messages (or the text) with the slots replaced. Slots inside `prompt` and `query` are not replaced."""

        def filled(text: str) -> str:
            return _SLOTS.sub(lambda slot: prompt if slot[0] == PROMPT else query, text)

        if self.kind == "chat":
            return [{"role": role, "content": filled(content)} for role, content in self.messages]
        return filled(self.body)

    def source_text(self) -> str:
        """A text with every character that the template itself can put into a rendering."""
        contents = "".join(content for _, content in self.messages)
        return contents + (self.chat_template or "") + self.variables + self.body


def _as_list(messages: Any) -> list[Any]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TemplateError(f"chat messages must be a list of messages, not {type(messages).__name__}.")
    return list(messages)


def _message(message: Any, index: int) -> tuple[str, str]:
    where = f"chat message {index + 1}"
    if not isinstance(message, Mapping):
        raise TemplateError(f"{where} must be an object with role and content, not {type(message).__name__}.")
    unknown = sorted(map(str, set(message) - {"role", "content"}))
    if unknown:
        raise TemplateError(f"{where} has the field {short(unknown[0])}; a message has role and content only.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise TemplateError(f"{where} has the role {short(role)}; allowed roles are {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise TemplateError(f"{where} ({role}) has no text as its content.")
    return role, content


def _require_slots(text: str, where: str) -> None:
    missing = [slot for slot in (PROMPT, QUERY) if slot not in text]
    if missing:
        raise TemplateError(f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing from {where}.")


def _variables(variables: Mapping[str, Any] | None) -> str:
    if variables is None:
        return "{}"
    if not isinstance(variables, Mapping) or not all(isinstance(key, str) for key in variables):
        raise TemplateError("variables of a chat template must be an object with names as keys.")
    reserved = sorted(set(variables) & {"messages", "add_generation_prompt"})
    if reserved:
        raise TemplateError(f"the chat template's variable {reserved[0]!r} cannot be given: the rendering sets it.")
    try:
        return json.dumps(dict(variables), sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"variables of a chat template must be JSON values: {error}.") from error
