"""Where prompt, query and answer stand: chat messages or plain text with the slots `{prompt}` and `{query}`.

Only these two strings are slots; all other braces (JSON, LaTeX) are text. The answer always follows after the rendered
template.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from embedgrad.prompt.sandbox import compile_chat_template
from embedgrad.util.errors import TemplateError
from embedgrad.util.shown import short

PROMPT, QUERY = "{prompt}", "{query}"
DATE = "strftime_now"  # the function with which chat templates ask for the date; as a variable, the date that it tells
ROLES = ("system", "developer", "user", "assistant", "tool")
_SETTINGS = ("variables", "chat_template", "control_tokens")
_ANY = ({"role": "user", "content": PROMPT + QUERY},)
_DOUBLED = re.compile(r"(?<!\w)\{\{\s*(prompt|query)\s*\}\}")  # behind a word it is LaTeX: \boxed{{query}}
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
    control_tokens: bool = False

    @classmethod
    def chat(
        cls,
        messages: Sequence[Mapping[str, str]],
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        control_tokens: bool = False,
    ) -> Template:
        """Chat messages (`role`, `content`), rendered with a Jinja chat template.

        messages: `{prompt}` and `{query}` each occur at least once in the content of a message. The last message is not
            the assistant's, because the answer follows it.
        chat_template: Jinja source; None: the model's.
        variables: further variables of the chat template, such as `{"enable_thinking": False}`. "strftime_now" is the
            date that the function of this name tells, such as "2026-01-30"; a prompt is given that of its day.
        control_tokens: whether the text of a control token (`<|im_end|>`) in a prompt, query or target is that token;
            otherwise it is tokenised as ordinary text. In the messages themselves it always is the token.
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
        return cls(
            "chat",
            messages=pairs,
            chat_template=chat_template,
            variables=_variables(variables),
            control_tokens=_flag(control_tokens),
        )

    @classmethod
    def text(cls, body: str, end: bool = True, control_tokens: bool = False) -> Template:
        """Plain text for models without a chat template. The answer follows directly after `body`.

        One BOS token comes first if the tokenizer adds one. With end=True the end-of-text token is the last target.
        control_tokens: as in `chat`.
        Raises TemplateError where a slot is missing.
        """
        if not isinstance(body, str):
            raise TemplateError(f"a text template must be text, not {type(body).__name__}.")
        if not isinstance(end, bool):
            raise TemplateError(f"`end` of a text template must be true or false, not {short(end)}.")
        _require_slots(body, "the text template")
        return cls("text", body=body, end=end, control_tokens=_flag(control_tokens))

    @classmethod
    def plain(cls, control_tokens: bool = False) -> Template:
        """The tokens of prompt, query and target one after another, with nothing between them, no BOS and no end token.

        control_tokens: as in `chat`.
        """
        return cls("plain", control_tokens=_flag(control_tokens))

    @property
    def has_messages(self) -> bool:
        """False for chat settings alone (`from_json`), which another template's messages complete."""
        return self.kind != "chat" or bool(self.messages)

    def completed(self, base: Template) -> Template:
        """These chat settings with the messages of `base`, a chat template, and with its settings where they are unset.

        Raises TemplateError where `base` is of another kind.
        """
        if base.kind != "chat":
            raise TemplateError("settings of a chat template are given, and there is neither one nor messages.")
        return replace(
            base,
            chat_template=base.chat_template if self.chat_template is None else self.chat_template,
            variables=_variables({**json.loads(base.variables), **json.loads(self.variables)}),
            control_tokens=base.control_tokens or self.control_tokens,
        )

    @property
    def date(self) -> str | None:
        """The date that the chat template is told; None where it reads the clock, or asks for none."""
        found = json.loads(self.variables).get(DATE)
        return None if found is None else str(found)

    def on(self, date: str) -> Template:
        """A copy whose chat template is told this date, such as "2026-01-30"."""
        return replace(self, variables=_variables({**json.loads(self.variables), DATE: date}))

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
            if self.messages:
                fields["messages"] = [{"role": role, "content": content} for role, content in self.messages]
            fields["chat_template"] = self.chat_template
            fields["variables"] = json.loads(self.variables)
        elif self.kind == "text":
            fields |= {"text": self.body, "end": self.end}
        if self.control_tokens:
            fields["control_tokens"] = True
        return json.dumps(fields)

    @classmethod
    def from_json(cls, source: str | Mapping[str, Any]) -> Template:
        """The template of a JSON object as `to_json` writes it, or of the same mapping. Raises TemplateError.

        A chat template without the field messages is settings alone (`has_messages`). `enable_thinking`, which many
        chat templates know, may stand beside the variables instead of among them.
        """
        fields = source
        if isinstance(source, str):
            try:
                fields = json.loads(source)
            except (ValueError, RecursionError) as error:
                raise TemplateError(f"the template is not valid JSON: {error}.") from error
        if not isinstance(fields, Mapping):
            raise TemplateError(f"a template must be an object with a kind, not {type(fields).__name__}.")
        allowed = {
            "chat": {"kind", "messages", "enable_thinking", *_SETTINGS},
            "text": {"kind", "text", "end", "control_tokens"},
            "plain": {"kind", "control_tokens"},
        }
        kind = fields.get("kind", "chat" if {"messages", "enable_thinking", *_SETTINGS[:2]} & set(fields) else None)
        if not isinstance(kind, str) or kind not in allowed:
            raise TemplateError(f"a template's kind must be chat, text or plain, not {short(kind)}.")
        unknown = sorted(map(str, set(fields) - allowed[kind]))
        if unknown:
            known = ", ".join(sorted(allowed[kind]))
            raise TemplateError(f"a {kind} template has no field {short(unknown[0])}; its fields are {known}.")
        keeps = fields.get("control_tokens", False)
        if kind == "chat":
            variables = fields.get("variables")
            if "enable_thinking" in fields and (variables is None or isinstance(variables, Mapping)):
                variables = {"enable_thinking": fields["enable_thinking"], **(variables or {})}
            found = cls.chat(fields.get("messages", _ANY), fields.get("chat_template"), variables, keeps)
            return found if "messages" in fields else replace(found, messages=())
        if kind == "text":
            return cls.text(fields.get("text", ""), fields.get("end", True), keeps)
        return cls.plain(keeps)

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


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TemplateError(f"`control_tokens` of a template must be true or false, not {value!r}.")
    return value


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
    doubled = _DOUBLED.search(text)
    if doubled:
        raise TemplateError(
            f"{where} {'have' if where.endswith('s') else 'has'} {doubled[0]}, whose outer braces would stay as text; "
            f"write {{{doubled[1]}}}."
        )
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
    if DATE in variables:
        variables = {**variables, DATE: _day(variables[DATE])}
    try:
        return json.dumps(dict(variables), sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"variables of a chat template must be JSON values: {error}.") from error


def _day(value: Any) -> str:
    """A date as YAML or JSON give it, as text. Raises TemplateError."""
    try:
        return (value if type(value) is datetime.date else datetime.date.fromisoformat(value)).isoformat()
    except (TypeError, ValueError):
        raise TemplateError(
            f"the chat template's variable {DATE!r} is {str(value)[:40]!r}; it should be a date like 2026-01-30."
        ) from None
