"""The target `ollama`: a GGUF file and a Modelfile for each prompt.

Ollama renders conversations with Go templates, not with the file's Jinja. What the Jinja template writes around each
role's text becomes a Go template that goes through the turns. Its conversations are compared with the Jinja template's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedgrad.exports.chat_template import VARIABLE
from embedgrad.exports.gguf import write_gguf
from embedgrad.exports.model_card import gguf_card
from embedgrad.exports.source import NamedPrompt, Source
from embedgrad.exports.vocabulary import NewTokens, Vocabulary
from embedgrad.prompt.rendering import end_token
from embedgrad.prompt.sandbox import compile_chat_template
from embedgrad.prompt.template import PROMPT, QUERY
from embedgrad.util.errors import ExportError, TemplateError

FILE = "model.gguf"
_MARKS = ("\ue0ff", "\ue1ff", "\ue2ff")  # private-use characters far from those that stand for prompt rows
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turns:
    """What a chat template writes: (before, after) each role's text, before all turns, and to ask for an answer.

    bos: a BOS token that llama.cpp adds by itself. default: the system message that is added where there is none.
    """

    around: Mapping[str, tuple[str, str]]
    bos: str
    begin: str
    ask: str
    default: str | None

    def text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as the Go template renders it."""
        turns = (self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in messages)
        return self.bos + self.begin + "".join(turns) + self.ask


def write_ollama(
    source: Source, prompts: Sequence[NamedPrompt], out: Path, *, untie: bool
) -> tuple[Vocabulary, dict[str, Any]]:
    """Writes the folder `out`, which exists and is empty. The first prompt's file is Modelfile, another's
    Modelfile.NAME. Raises ExportError where a Go template cannot say what the chat template does."""
    words, facts = write_gguf(source, prompts, out / FILE, untie=untie)
    for number, (named, tokens) in enumerate(zip(prompts, words.tokens, strict=True)):
        name = f"Modelfile.{named.name}" if number else "Modelfile"
        (out / name).write_text(modelfile(source, named, tokens, words), encoding="utf-8")
    card = gguf_card(source, prompts, words, facts, FILE)
    lines = [f"    ollama create {n.name} -f Modelfile{f'.{n.name}' if i else ''}" for i, n in enumerate(prompts)]
    (out / "README.md").write_text(card + "\n".join(["## Ollama", "", *lines, ""]), encoding="utf-8")
    return words, facts


def modelfile(source: Source, named: NamedPrompt, tokens: NewTokens, words: Vocabulary) -> str:
    """The Modelfile of one prompt. Raises ExportError."""
    template = named.prompt.template
    lines = [f"FROM ./{FILE}"]
    if template.kind != "chat":
        body = template.body if template.kind == "text" else PROMPT + QUERY
        lines.append("TEMPLATE " + _quoted(_go(body, tokens, "{{ .Prompt }}", named.name), named.name))
    else:
        lines += _chat_lines(source, named, tokens, words)
    end = end_token(source, named.prompt)
    if end is not None:
        lines.append("PARAMETER stop " + _quoted(source.tokenizer.token(end), named.name))
    return "\n".join(lines) + "\n"


def _chat_lines(source: Source, named: NamedPrompt, tokens: NewTokens, words: Vocabulary) -> list[str]:
    messages = named.prompt.template.messages
    at = next(i for i, (_, content) in enumerate(messages) if QUERY in content)
    if messages[at + 1 :] or messages[at][0] != "user":
        raise ExportError(f"the prompt {named.name} has messages after the query, which Ollama's templates cannot add.")
    turns = _turns(source, named)
    before = [{"role": r if r != "developer" else "system", "content": c} for r, c in messages[:at]]
    if before[:1] and before[0]["role"] == "system":
        system: str | None = before.pop(0)["content"]
    else:
        system = turns.default
    pattern = messages[at][1]
    if pattern != QUERY and any(message["role"] == "user" for message in before):
        raise _no_turns(source, named)
    _compare(named, tokens, words, turns, [*_system(system), *before], pattern, source)
    lines = ["TEMPLATE " + _quoted(_go_turns(turns, pattern, tokens, named.name), named.name)]
    if system is not None:
        lines.append("SYSTEM " + _quoted(system.replace(PROMPT, tokens.placeholder), named.name))
    for message in before:
        content = message["content"].replace(PROMPT, tokens.placeholder)
        lines.append(f"MESSAGE {message['role']} " + _quoted(content, named.name))
    return lines


def _system(content: str | None) -> list[dict[str, str]]:
    return [] if content is None else [{"role": "system", "content": content}]


def _turns(source: Source, named: NamedPrompt) -> Turns:
    """Reads off the chat template what it writes around each role. Raises ExportError where that is not constant."""
    system, user, assistant = _MARKS
    first = {"role": "user", "content": user}
    answer = {"role": "assistant", "content": assistant}

    def render(messages: list[dict[str, str]], ask: bool = False) -> str:
        return _render(source, named, messages, ask)

    try:
        alone, asked = render([first]), render([first], ask=True)
        pair = render([first, answer])
        triple = render([first, answer, {"role": "user", "content": system}])
    except TemplateError as error:
        raise _no_turns(source, named) from error
    try:
        whole = render([{"role": "system", "content": system}, first])
    except TemplateError:
        whole = ""
    tail = triple.removeprefix(pair)
    if not asked.startswith(alone) or not pair.startswith(alone) or tail.count(system) != 1 or alone.count(user) != 1:
        raise _no_turns(source, named)
    before, after = tail.split(system)
    head = alone.split(user)[0]
    around = {"user": (before, after), "assistant": _split(pair.removeprefix(alone), assistant, source, named)}
    bos = source.tokenizer.special.get("bos_token", "") if source.tokenizer.adds_bos else ""
    bos = bos if head.startswith(bos) else ""
    begin, default = head.removesuffix(before).removeprefix(bos), None
    if whole.count(system) == 1 and whole.endswith(before + user + after):
        opening, closing = whole.removesuffix(before + user + after).removeprefix(bos).split(system)
        around["system"] = (opening, closing)
        if begin.startswith(opening) and begin.endswith(closing) and len(begin) >= len(opening + closing):
            default, begin = begin[len(opening) : len(begin) - len(closing)], ""
    return Turns(around, bos, begin, asked.removeprefix(alone), default)


def _split(turn: str, mark: str, source: Source, named: NamedPrompt) -> tuple[str, str]:
    if turn.count(mark) != 1:
        raise _no_turns(source, named)
    before, after = turn.split(mark)
    return before, after


def _no_turns(source: Source, named: NamedPrompt) -> ExportError:
    return ExportError(
        f"the chat template of {source.name} does more than to write one turn after the other, so that Ollama has no "
        f"template for the prompt {named.name}; serve the gguf export with llama.cpp instead."
    )


def _render(source: Source, named: NamedPrompt, messages: list[dict[str, str]], ask: bool) -> str:
    template = named.prompt.template
    own = template.chat_template if template.chat_template is not None else source.tokenizer.chat_template
    variables = json.loads(template.variables)
    return compile_chat_template(str(own)).render(
        messages, source.tokenizer.special, add_generation_prompt=ask, variables=variables
    )


def _compare(
    named: NamedPrompt,
    tokens: NewTokens,
    words: Vocabulary,
    turns: Turns,
    before: list[dict[str, str]],
    pattern: str,
    source: Source,
) -> None:
    """Raises ExportError where the Go template would write other conversations than the file's chat template."""
    one = [{"role": "user", "content": "a film"}]
    more = [*one, {"role": "assistant", "content": "good"}, {"role": "user", "content": "12 more"}]
    for messages in (one, more):
        wanted = compile_chat_template(words.chat_template).render(
            messages, source.tokenizer.special, add_generation_prompt=True, variables={VARIABLE: named.name}
        )
        changed = [
            {**m, "content": pattern.replace(QUERY, m["content"])} if m["role"] == "user" else m for m in messages
        ]
        filled = [{**m, "content": m["content"].replace(PROMPT, tokens.placeholder)} for m in [*before, *changed]]
        if any(m["role"] not in turns.around for m in filled) or turns.text(filled) != wanted:
            raise _no_turns(source, named)


def _go_turns(turns: Turns, pattern: str, tokens: NewTokens, name: str) -> str:
    """The Go template."""
    branches: list[str] = []
    for role in _ROLES:
        if role in turns.around:
            before, after = turns.around[role]
            content = _go(pattern, tokens, "{{ .Content }}", name) if role == "user" else "{{ .Content }}"
            word = "else if" if branches else "if"
            branches.append(f'{{{{ {word} eq .Role "{role}" }}}}{_plain(before, name)}{content}{_plain(after, name)}')
    loop = "{{ range .Messages }}" + "".join(branches) + "{{ end }}{{ end }}"
    return _plain(turns.begin, name) + loop + _plain(turns.ask, name)


def _go(text: str, tokens: NewTokens, query: str, name: str) -> str:
    return query.join(_plain(part, name) for part in text.replace(PROMPT, tokens.placeholder).split(QUERY))


def _plain(text: str, name: str) -> str:
    """A constant text of a Go template."""
    if "{{" in text or "}}" in text:
        raise ExportError(f"the prompt {name} stands beside braces, which Ollama's templates would read as commands.")
    return text


def _quoted(text: str, name: str) -> str:
    if '"""' in text:
        raise ExportError(f'the prompt {name} stands beside """, which a Modelfile cannot hold.')
    return f'"""{text}"""'
