"""Whether the copy's tokenizer and chat template give the ids of our own rendering."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from embedgrad.exports.chat_template import VARIABLE
from embedgrad.exports.source import NamedPrompt, Source
from embedgrad.exports.vocabulary import Vocabulary
from embedgrad.model.tokenizer import Tokenizer
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import Rendered, TokenisationWarning, render_query
from embedgrad.prompt.sandbox import compile_chat_template
from embedgrad.util.errors import ExportError

QUERIES = (
    "a great film",
    "Why is 12345 + 678 not 13,000? Don't guess:\n\n    x = f(1)  # twice",
    "naïve café, 你好 🙂 - Привет…",
)
"""Three conversations' queries: plain words; numbers, contractions and code; letters of other scripts."""


@dataclass(frozen=True)
class Conversation:
    """A query of a prompt with our rendering.

    ids: the ids that another program must read, with the new tokens where `rendered` shows prompt rows.
    """

    name: str
    query: str
    rendered: Rendered
    ids: list[int]

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.query}]


def conversations(
    source: Source, prompts: Sequence[NamedPrompt], words: Vocabulary, queries: Sequence[str] = QUERIES
) -> list[Conversation]:
    """Each query with each prompt."""
    made = []
    for named, tokens in zip(prompts, words.tokens, strict=True):
        shown = tokens.shown_ids
        for query in queries:
            rendered = quietly_rendered(source, named.prompt, query)
            pairs = zip(rendered.ids, rendered.prompt_rows, strict=True)
            made.append(Conversation(named.name, query, rendered, [i if r < 0 else shown[r] for i, r in pairs]))
    return made


def quietly_rendered(source: Source, prompt: SoftPrompt, query: str) -> Rendered:
    """`render_query` without the warning about its tokens, which the user of a tuned prompt has seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TokenisationWarning)
        return render_query(source, prompt, query)


def wrong_names(tokenizer: Tokenizer, words: Vocabulary, asked: Sequence[Conversation]) -> dict[str, str]:
    """For each prompt whose ids differ in the copy, by name, where they differ."""
    template = compile_chat_template(words.chat_template)
    wrong = {}
    for each in asked:
        variables = {VARIABLE: each.name}
        text = template.render(each.messages, tokenizer.special, add_generation_prompt=True, variables=variables)
        ids = tokenizer.encode(text)
        if ids != each.ids:
            pairs = enumerate(zip([*ids, -1], [*each.ids, -1], strict=False))
            at = next(i for i, (one, other) in pairs if one != other)
            wrong[each.name] = difference(ids, each.ids, tokenizer, at)
    return wrong


def difference(found: Sequence[int], wanted: Sequence[int], tokenizer: Tokenizer, at: int) -> str:
    """The place where two lists of ids part, as text."""
    one, other = (tokenizer.texts(list(ids)[max(at - 1, 0) : at + 3]) for ids in (found, wanted))
    return f"at token {at} it reads {one} where embedgrad reads {other}"


def right_names(attempt: Callable[[Collection[str]], tuple[Vocabulary, dict[str, str]]]) -> Vocabulary:
    """The vocabulary with which every prompt has our ids. Raises ExportError where there is none.

    attempt: makes the vocabulary with spaces in the first tokens of the prompts named; gives it and `wrong_names`.
    """
    words, wrong = attempt(())
    if wrong and not words.special:
        words, wrong = attempt(list(wrong))
    for name, where in wrong.items():
        raise ExportError(f"the prompt {name} cannot be exported exactly: the copy's tokenizer differs, {where}.")
    return words
