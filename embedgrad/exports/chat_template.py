"""The Jinja chat template of a model copy whose vocabulary holds prompts.

The template consists of a *front*, which changes the caller's messages so that a prompt stands where its own template
puts it, and the chat template that renders the changed messages. Other programs run it, and so does `embedgrad serve`.

Where the prompt's template has messages before the one with the query, they come before the caller's messages. A system
message among them is left out where the caller sends one. Where the query's own message holds other text, every message
of the user gets this text. Messages after the query's come last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedgrad.prompt.template import PROMPT, QUERY, Template
from embedgrad.util.errors import ExportError

VARIABLE = "embedgrad_prompt"
"""Name of the template variable that chooses a prompt."""
BARE = "none"
"""Value of the variable for the model without a prompt."""
_FIRST_TAG = re.compile(r"[ \t]+(?=\{[%#](?!\+))")
_SYSTEM = ("system", "developer")
_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


@dataclass(frozen=True)
class Placed:
    """A prompt in a chat template. text: what the template writes in the prompt's slots."""

    name: str
    template: Template
    text: str


def chat_template(prompts: Sequence[Placed], source: str | None, bos: str = "") -> str:
    """The chat template in which the first of `prompts` is the default.

    source: the model's own chat template, None where it has none. bos: the text of the token that a text template
    begins with, where the tokenizer adds one. Raises ExportError for a prompt whose template needs the model's.
    """
    lines = [f"{{%- if {VARIABLE} is not defined %}}{{%- set {VARIABLE} = {literal(prompts[0].name)} %}}{{%- endif %}}"]
    word = "if"
    for placed in prompts:
        if placed.template.kind == "chat":
            lines += [f"{{%- {word} {VARIABLE} == {literal(placed.name)} %}}", *_front(placed)]
            word = "elif"
    known = [placed.name for placed in prompts] + [BARE]
    names = "[" + ", ".join(map(literal, known)) + "]"
    complaint = literal(f"{VARIABLE} must be one of {', '.join(known)}")
    lines += [f"{{%- {word} {VARIABLE} not in {names} %}}", f"{{{{- raise_exception({complaint}) }}}}", "{%- endif %}"]
    return "\n".join(lines) + _bodies(prompts, source, bos)


def literal(value: Any) -> str:
    """A JSON value as a Jinja expression. Texts use only the escapes that every engine's Jinja knows."""
    if isinstance(value, str):
        return "'" + "".join(_ESCAPES.get(character, character) for character in value) + "'"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(literal, value)) + "]"
    return json.dumps(value)


def _front(placed: Placed) -> list[str]:
    """The lines that set the variables of a prompt's template and change `messages`."""
    lines = []
    for name, value in json.loads(placed.template.variables).items():
        if not name.isidentifier():
            raise ExportError(f"the prompt {placed.name} sets the variable {name!r}, which no Jinja template can name.")
        lines.append(f"{{%- if {name} is not defined %}}{{%- set {name} = {literal(value)} %}}{{%- endif %}}")
    messages = placed.template.messages
    at = next(i for i, (_, content) in enumerate(messages) if QUERY in content)
    before, (role, pattern), after = messages[:at], messages[at], messages[at + 1 :]
    if (role, pattern) != ("user", QUERY) or after:
        lines += _rewritten(placed, role, pattern, after)
    return [*lines, *_preceded(placed, before)] if before else lines


def _preceded(placed: Placed, before: Sequence[tuple[str, str]]) -> list[str]:
    """The lines that put the messages `before` in front. The caller's system message takes the place of theirs."""
    whole = "[" + ", ".join(_message(placed, message) for message in before) + "]"
    rest = "[" + ", ".join(_message(placed, message) for message in before if message[0] not in _SYSTEM) + "]"
    lines = [
        "{%- if messages[0]['role'] != 'system' and messages[0]['role'] != 'developer' %}",
        f"{{%- set messages = {whole} + messages %}}",
    ]
    if rest != "[]":
        lines += ["{%- else %}", f"{{%- set messages = [messages[0]] + {rest} + messages[1:] %}}"]
    return [*lines, "{%- endif %}"]


def _rewritten(placed: Placed, role: str, pattern: str, after: Sequence[tuple[str, str]]) -> list[str]:
    """The lines that put the template's text around every message of the user, and the messages `after` at the end."""
    complaint = literal(f"the prompt {placed.name} takes messages with text only")
    end = " + [" + ", ".join(_message(placed, message) for message in after) + "]" if after else ""
    return [
        "{%- set embedgrad = namespace(turns=[], query='') %}",
        "{%- for message in messages %}",
        "{%- if message['role'] == 'user' %}",
        f"{{%- if message['content'] is not string %}}{{{{- raise_exception({complaint}) }}}}{{%- endif %}}",
        "{%- set embedgrad.query = message['content'] %}",
        f"{{%- set embedgrad.turns = embedgrad.turns + [{_message(placed, (role, pattern))}] %}}",
        "{%- else %}",
        "{%- set embedgrad.turns = embedgrad.turns + [message] %}",
        "{%- endif %}",
        "{%- endfor %}",
        f"{{%- set messages = embedgrad.turns{end} %}}",
    ]


def _message(placed: Placed, message: tuple[str, str]) -> str:
    role, content = message
    return f"{{'role': {literal(role)}, 'content': {_filled(placed, content, 'embedgrad.query')}}}"


def _filled(placed: Placed, content: str, query: str) -> str:
    """A content with slots as a Jinja expression: constant texts and the variable `query`, added."""
    parts = content.replace(PROMPT, placed.text).split(QUERY)  # a text in the vocabulary holds no slot
    terms = []
    for number, part in enumerate(parts):
        terms += [query] if number else []
        terms += [literal(part)] if part or len(parts) == 1 else []
    return " + ".join(terms)


def _bodies(prompts: Sequence[Placed], source: str | None, bos: str) -> str:
    """What renders the changed messages: the model's chat template, a prompt's own one, or a text template."""
    special = [p for p in prompts if p.template.kind != "chat" or p.template.chat_template not in (None, source)]
    for placed in prompts:
        if source is None and placed.template.kind == "chat" and placed.template.chat_template is None:
            raise ExportError(f"the prompt {placed.name} needs a chat template, and the model has none.")
    if not special:
        assert source is not None
        return _joined(source)
    pieces = []
    for number, placed in enumerate(special):
        body = _text_body(placed, bos) if placed.template.kind != "chat" else str(placed.template.chat_template)
        test = f"{{%- {'elif' if number else 'if'} {VARIABLE} == {literal(placed.name)} %}}"
        pieces.append(test + _joined(body.removesuffix("\n")))
    body = source or "{{ raise_exception('the model has no chat template') }}"
    pieces.append("{%- else %}" + _joined(body.removesuffix("\n")))
    # An empty output before a tag keeps the white space that the tag would strip.
    return "".join(piece + "{{ '' }}" for piece in pieces[:-1]) + pieces[-1] + "{{ '' }}{%- endif %}"


def _joined(body: str) -> str:
    """A template behind other lines. The joint writes nothing and keeps the white space at the template's beginning.

    Blanks before a first tag are left out: at the beginning of a line all engines strip them (`lstrip_blocks`).
    """
    body = _FIRST_TAG.sub("", body, count=1) if _FIRST_TAG.match(body) else body
    return ("{{- '' }}" if body[:1].isspace() or not body else "{{- '' -}}\n") + body


def _text_body(placed: Placed, bos: str) -> str:
    """The template of a prompt that stands in plain text. It takes one message."""
    template = placed.template
    body = template.body if template.kind == "text" else PROMPT + QUERY
    complaint = literal(f"the prompt {placed.name} stands in plain text and takes one message of the user")
    begin = literal(bos) + " + " if template.kind == "text" and bos else ""
    return (
        "{%- if messages|length != 1 or messages[0]['role'] != 'user' %}"
        f"{{{{- raise_exception({complaint}) }}}}{{%- endif %}}"
        f"{{{{- {begin}{_filled(placed, body, '''messages[0]['content']''')} }}}}"
    )
