"""From text with slots to token ids, so that a slot keeps exactly the tokens it was given.

A *part* is a piece of text or a `Slot`: token ids with the text that stands for them. Tokenising the text of all parts
at once is what a model saw in training; it is used where its token boundaries fall on the slots' ends and the slots
have their own tokens there. Otherwise the parts are tokenised one by one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedgrad.memo import PerObject

if TYPE_CHECKING:
    from embedgrad.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Slot:
    """Given token ids and their text; `is_prompt` tells the prompt from a query or an answer given as ids."""

    ids: tuple[int, ...]
    text: str
    is_prompt: bool = False


Part = str | Slot


def whole_text(parts: Sequence[Part]) -> str:
    """The text of all parts, one after another."""
    return "".join(part if isinstance(part, str) else part.text for part in parts)


def tokenise_whole(tokenizer: Tokenizer, parts: Sequence[Part]) -> tuple[list[int], list[int]] | None:
    """(ids, prompt rows or −1) of the whole text at once; None where a slot would not have its own tokens."""
    ids, offsets = tokenizer.encode_with_offsets(whole_text(parts))
    starts, ends = _monotone(offsets)
    rows = [-1] * len(ids)
    position = done = 0
    for part in parts:
        if isinstance(part, str):
            position += len(part)
            continue
        count = len(part.ids)
        found = _find(ids, starts, ends, position, part.ids)
        position += len(part.text)
        if found is None or found < done or _cut_crosses(starts, ends, found + count, position):
            return None
        done = found + count
        if part.is_prompt:
            rows[found:done] = range(count)
    return ids, rows


def tokenise_pieces(tokenizer: Tokenizer, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
    """(ids, prompt rows or −1) with each part tokenised alone."""
    ids: list[int] = []
    rows: list[int] = []
    for part in parts:
        if isinstance(part, Slot):
            ids.extend(part.ids)
            rows.extend(range(len(part.ids)) if part.is_prompt else [-1] * len(part.ids))
        elif part:
            piece = continue_with(tokenizer, part) if ids else tokenizer.encode(part)
            ids.extend(piece)
            rows.extend([-1] * len(piece))
    return ids, rows


def tokens_in_place(tokenizer: Tokenizer, parts: Sequence[Part], text: str) -> list[int] | None:
    """The tokens that `text` has at every prompt slot of the whole text; None where they differ or straddle an end."""
    ids, offsets = tokenizer.encode_with_offsets(whole_text(parts))
    starts, ends = _monotone(offsets)
    found: list[int] | None = None
    position = 0
    for part in parts:
        if isinstance(part, str) or not part.is_prompt:
            position += len(part) if isinstance(part, str) else len(part.text)
            continue
        here = [
            ids[first:last]
            for first in _cuts(starts, ends, position)
            for last in _cuts(starts, ends, position + len(part.text))
            if tokenizer.decode(ids[first:last], skip_special=False) == text
        ]
        position += len(part.text)
        if not here or (found is not None and found not in here):
            return None
        found = found or here[0]
    return found


def continue_with(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of `text` where it does not begin the sequence.

    SentencePiece-like tokenizers put a space in front of a text; a continuation has none, so there `text` is
    tokenised behind a line break that is then taken off again.
    """
    if not _adds_space(tokenizer):
        return tokenizer.encode(text)
    before, both = tokenizer.encode("\n"), tokenizer.encode("\n" + text)
    return both[len(before) :] if both[: len(before)] == before else tokenizer.encode(text)


_SPACE: PerObject[bool] = PerObject()


def _adds_space(tokenizer: Tokenizer) -> bool:
    return _SPACE.get(tokenizer, "", lambda: _probe_space(tokenizer))


def _probe_space(tokenizer: Tokenizer) -> bool:
    alone, before, both = tokenizer.encode("a"), tokenizer.encode("\n"), tokenizer.encode("\na")
    return both[: len(before)] == before and both[len(before) :] != alone


def _monotone(offsets: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Starts and ends that never go back, as bisection needs; tokens without text of their own inherit an end."""
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
    """Every token index at which the tokens before end at or before `position`, and the others start there or later."""
    return range(bisect_left(starts, position), bisect_right(ends, position) + 1)


def _cut_crosses(starts: Sequence[int], ends: Sequence[int], index: int, position: int) -> bool:
    return index not in _cuts(starts, ends, position)


def _find(
    ids: Sequence[int], starts: Sequence[int], ends: Sequence[int], position: int, wanted: tuple[int, ...]
) -> int | None:
    for index in _cuts(starts, ends, position):
        if tuple(ids[index : index + len(wanted)]) == wanted:
            return index
    return None
