"""Tokenises text with slots, so that each slot keeps exactly its given tokens.

A *part* is a piece of text or a `Slot`, which has token ids and the text that they stand for. In training the model saw
text that was tokenised as a whole. So the text of all parts is tokenised at once, if the slots then begin and end at
token boundaries and have their given tokens. Otherwise the parts are tokenised one by one. A slot's first token may
hold the space in front of the slot: a tokenizer that puts a space before every text gives it such a token.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from embedgrad.util.memo import PerObject


class Encoder(Protocol):
    """What tokenises: a `Tokenizer`, or the `LiteralTokenizer` of one."""

    def encode(self, text: str) -> list[int]: ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def token(self, id: int) -> str: ...


@dataclass(frozen=True)
class Slot:
    """Given token ids and their text. is_prompt: the slot is the prompt, not a query that is given as ids."""

    ids: tuple[int, ...]
    text: str
    is_prompt: bool = False


Part = str | Slot


def whole_text(parts: Sequence[Part]) -> str:
    """The text of all parts, joined."""
    return "".join(part if isinstance(part, str) else part.text for part in parts)


def tokenise_whole(tokenizer: Encoder, parts: Sequence[Part]) -> tuple[list[int], list[int]] | None:
    """(ids, for each the prompt row or −1) of the text as a whole; None where a slot would have other tokens."""
    text = whole_text(parts)
    ids, offsets = tokenizer.encode_with_offsets(text)
    starts, ends = _monotone(offsets)
    prompt_rows = [-1] * len(ids)
    position = done = 0
    for part in parts:
        if isinstance(part, str):
            position += len(part)
            continue
        count = len(part.ids)
        found = _find(ids, _first_tokens(text, starts, ends, position), part.ids)
        position += len(part.text)
        if found is None or found < done or _cut_crosses(starts, ends, found + count, position):
            return None
        done = found + count
        if part.is_prompt:
            prompt_rows[found:done] = range(count)
    return ids, prompt_rows


def tokenise_pieces(tokenizer: Encoder, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
    """(ids, for each the prompt row or −1) with each part tokenised alone."""
    ids: list[int] = []
    prompt_rows: list[int] = []
    for part, behind in zip(parts, [*parts[1:], ""], strict=True):
        if isinstance(part, str) and isinstance(behind, Slot) and _holds_space(tokenizer, behind):
            part = part.removesuffix(" ")
        if isinstance(part, Slot):
            ids.extend(part.ids)
            prompt_rows.extend(range(len(part.ids)) if part.is_prompt else [-1] * len(part.ids))
        elif part:
            piece = continue_with(tokenizer, part) if ids else tokenizer.encode(part)
            ids.extend(piece)
            prompt_rows.extend([-1] * len(piece))
    return ids, prompt_rows


def tokens_in_place(tokenizer: Encoder, parts: Sequence[Part], text: str) -> list[int] | None:
    """The tokens that `text` has in every prompt slot when the text is tokenised as a whole.

    None where they differ from slot to slot, or where a token crosses the end of a slot.
    """
    whole = whole_text(parts)
    ids, offsets = tokenizer.encode_with_offsets(whole)
    starts, ends = _monotone(offsets)
    found: list[int] | None = None
    position = 0
    for part in parts:
        if isinstance(part, str) or not part.is_prompt:
            position += len(part) if isinstance(part, str) else len(part.text)
            continue
        here = [
            ids[first:last]
            for first in _first_tokens(whole, starts, ends, position)
            for last in _cuts(starts, ends, position + len(part.text))
            if tokenizer.decode(ids[first:last], skip_special=False) == text
        ]
        position += len(part.text)
        if not here or (found is not None and found not in here):
            return None
        found = found or here[0]
    return found


def continue_with(tokenizer: Encoder, text: str) -> list[int]:
    """The tokens of `text` where it does not begin the sequence.

    SentencePiece tokenizers add a space before a text, which a continuation must not have. With such a tokenizer
    `text` is tokenised after a line break, whose tokens are then removed.
    """
    if not _adds_space(tokenizer):
        return tokenizer.encode(text)
    before, both = tokenizer.encode("\n"), tokenizer.encode("\n" + text)
    return both[len(before) :] if both[: len(before)] == before else tokenizer.encode(text)


_SPACE: PerObject[bool] = PerObject()


def _adds_space(tokenizer: Encoder) -> bool:
    return _SPACE.get(tokenizer, "", lambda: _probe_space(tokenizer))


def _probe_space(tokenizer: Encoder) -> bool:
    alone, before, both = tokenizer.encode("a"), tokenizer.encode("\n"), tokenizer.encode("\na")
    return both[: len(before)] == before and both[len(before) :] != alone


def _monotone(offsets: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """(starts, ends) of the tokens as ascending lists, for bisection. A token without text takes the end before it."""
    starts, ends = [], []
    last = 0
    for start, _ in offsets:
        last = max(last, start)
        starts.append(last)
    last = 0
    for _, end in offsets:
        last = max(last, end)
        ends.append(last)
    return starts, ends


def _cuts(starts: Sequence[int], ends: Sequence[int], position: int) -> range:
    """The token indices that split the tokens at the character `position`.

    All earlier tokens end at or before it, all others start at or after it.
    """
    return range(bisect_left(starts, position), bisect_right(ends, position) + 1)


def _cut_crosses(starts: Sequence[int], ends: Sequence[int], index: int, position: int) -> bool:
    return index not in _cuts(starts, ends, position)


def _first_tokens(text: str, starts: Sequence[int], ends: Sequence[int], position: int) -> list[int]:
    """The indices of tokens with which a slot at the character `position` may begin."""
    with_space = _cuts(starts, ends, position - 1) if text[position - 1 : position] == " " else ()
    return [*_cuts(starts, ends, position), *with_space]


def _holds_space(tokenizer: Encoder, slot: Slot) -> bool:
    """Whether the slot's first token holds the space in front of the slot, in a tokenizer that puts one there."""
    return min(slot.ids) >= 0 and _adds_space(tokenizer) and tokenizer.token(slot.ids[0]).startswith("▁")


def _find(ids: Sequence[int], places: Sequence[int], wanted: tuple[int, ...]) -> int | None:
    for index in places:
        if tuple(ids[index : index + len(wanted)]) == wanted:
            return index
    return None
