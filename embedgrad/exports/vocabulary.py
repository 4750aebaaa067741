"""Prompts as vocabulary: which new token stands for which prompt row, and what the chat template writes for a prompt.

A byte-level tokenizer gets special tokens such as <|NAME_0|>. It cuts a text at them as our rendering cuts it at the
prompt. A SentencePiece tokenizer puts a space before everything that follows a special token. There the new tokens are
private-use characters, ordinary pieces of the vocabulary, at which nothing is cut. Where a text begins with the prompt,
such a tokenizer puts a space before it; then the first token of the prompt takes the space in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.exports.chat_template import Placed, chat_template
from embedgrad.exports.source import NamedPrompt, Source
from embedgrad.prompt.sandbox import compile_chat_template
from embedgrad.util.errors import ExportError

SPACE = "▁"
# Unicode's private-use characters: those of the basic plane, then those of planes 15 and 16.
_PRIVATE = [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]


@dataclass(frozen=True)
class NewTokens:
    """The tokens of one prompt.

    texts, ids: one for each row. rows: [n, d] float32, the embeddings. placeholder: what the chat template writes.
    merge: the first two tokens' pieces (space, character) that the tokenizer must join; None: nothing to join.
    """

    name: str
    texts: tuple[str, ...]
    ids: tuple[int, ...]
    rows: Tensor
    placeholder: str
    merge: tuple[str, str] | None = None

    @property
    def shown_ids(self) -> list[int]:
        """The id for each prompt row, [k]."""
        return list(self.ids[: len(self.ids) - (self.merge is not None)])


@dataclass(frozen=True)
class Vocabulary:
    """All new tokens of an export. special: they are special tokens, not characters.

    rows: number of rows that the embedding table must have. chat_template: the copy's.
    """

    tokens: tuple[NewTokens, ...]
    special: bool
    rows: int
    chat_template: str

    @property
    def ids(self) -> list[int]:
        """All new ids, ascending."""
        return [id for each in self.tokens for id in each.ids]

    @property
    def embeddings(self) -> Tensor:
        """The rows of `ids`, [n, d] float32."""
        return torch.cat([each.rows for each in self.tokens])


def vocabulary(
    source: Source,
    prompts: Sequence[NamedPrompt],
    *,
    special: bool,
    first_id: int,
    known: Set[str],
    spaced: Collection[str] = (),
) -> Vocabulary:
    """New tokens for `prompts` with ids from `first_id` on.

    special: make special tokens. known: every text that the vocabulary has. spaced: names of the prompts whose first
    token takes a space in. Raises ExportError.
    """
    free = iter([chr(code) for code in _PRIVATE if chr(code) not in known] if not special else [])
    made, at = [], first_id
    for named in prompts:
        tokens = _special(named, at, known) if special else _characters(named, at, free, named.name in spaced)
        made.append(tokens)
        at += len(tokens.ids)
    placed = [Placed(n.name, n.prompt.template, t.placeholder) for n, t in zip(prompts, made, strict=True)]
    tokenizer = source.tokenizer
    bos = tokenizer.token(tokenizer.bos_id) if tokenizer.adds_bos and tokenizer.bos_id is not None else ""
    template = chat_template(placed, tokenizer.chat_template, bos)
    compile_chat_template(template)
    return Vocabulary(tuple(made), special, max(source.config.vocab_size, at), template)


def _special(named: NamedPrompt, first: int, known: Set[str]) -> NewTokens:
    rows = named.prompt.embeddings.detach().float()
    texts = tuple(f"<|{named.name}_{i}|>" for i in range(len(rows)))
    taken = next((text for text in texts if text in known), None)
    if taken is not None:
        raise ExportError(f"the model's vocabulary has the token {taken} already; give the prompt another --name.")
    return NewTokens(named.name, texts, tuple(range(first, first + len(texts))), rows, "".join(texts))


def _characters(named: NamedPrompt, first: int, free: Iterator[str], spaced: bool) -> NewTokens:
    rows = named.prompt.embeddings.detach().float()
    characters = [next(free, "") for _ in range(len(rows))]
    if "" in characters:
        raise ExportError(f"the prompt {named.name} has more rows than there are private-use characters.")
    placeholder = "".join(characters)
    if not spaced:
        return NewTokens(named.name, tuple(characters), tuple(range(first, first + len(rows))), rows, placeholder)
    texts = (SPACE + characters[0], *characters[1:], characters[0])  # the pieces of a joined token must be tokens, too
    rows = torch.cat([rows, rows[:1]])
    ids = tuple(range(first, first + len(rows)))
    return NewTokens(named.name, texts, ids, rows, placeholder, (SPACE, characters[0]))
