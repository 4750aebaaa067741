"""The words of a text, and the signs in it that carry meaning, in a form in which copies of a text are equal.

Case, spacing and punctuation make no difference. A sign carries meaning where it changes what is said: operators and
brackets of formulas, a decimal point, currencies, per cent, emoji, the signs in C++ and C#.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache, cached_property

from embedgrad.util.scripts import SPACELESS, marks

_KEPT = "^%‰&@"  # besides all of Unicode's symbols but modifiers such as ` and ´
_OPERATORS = "-*/·"
_BRACKETS = "()[]{}"
_DASHES = str.maketrans("‐‑‒–—―−﹣－", "---------")


_DECIMAL = re.compile(r"\d[.,:]\d")


def _pattern(text: str, signs: bool) -> re.Pattern[str]:
    """The pattern of the pieces of `text`, the simplest that does."""
    return _compiled(text.isascii(), signs, _DECIMAL.search(text) is not None)


@cache
def _compiled(ascii_only: bool, signs: bool, decimals: bool) -> re.Pattern[str]:
    """A word, or with `signs` a sign that may carry meaning. In scripts without spaces every character is a word."""
    sign = r"|[^\w\s.,;:?'\"`]" if signs else ""
    if ascii_only:
        return re.compile((r"\w+(?:(?<=\d)[.,:](?=\d)\w+)*" if decimals else r"\w+") + sign)
    letter = rf"(?:[^\W{SPACELESS}]|[{marks()}])"
    number = rf"(?:(?<=\d)[.,:](?=\d){letter}+)*" if decimals else ""
    return re.compile(rf"[{SPACELESS}][{marks()}]*|{letter}+{number}" + sign)


def words(text: str) -> list[str]:
    """The words of `text`: Unicode NFKC, case folded, without punctuation and signs."""
    normal = _normal(text)
    return _pattern(normal, False).findall(normal)


def words_and_signs(text: str) -> list[str]:
    """The words of `text` and the signs that carry meaning, in their order."""
    pieces = _Pieces(_normal(text))
    kept: list[str] = []
    for at, piece in enumerate(pieces.found):
        if piece.isalnum() or _is_word(piece) or _carries_meaning(pieces, at, kept[-1] if kept else ""):
            kept.append(piece)
    return kept


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().translate(_DASHES)


class _Pieces:
    """The words and signs of a text in its normal form."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._pattern = _pattern(text, True)
        self.found: list[str] = self._pattern.findall(text)

    def at(self, index: int) -> str:
        """The piece with this index; "" where there is none."""
        return self.found[index] if 0 <= index < len(self.found) else ""

    @cached_property
    def _ranges(self) -> list[tuple[int, int]]:
        return [match.span() for match in self._pattern.finditer(self._text)]

    def touch(self, index: int) -> bool:
        """Whether nothing stands between this piece and the one before it."""
        return 0 < index < len(self.found) and self._ranges[index - 1][1] == self._ranges[index][0]


def _is_word(piece: str) -> bool:
    return len(piece) > 1 or piece.isalnum() or piece == "_" or unicodedata.category(piece)[0] == "M"


def _is_operand(piece: str) -> bool:
    """Whether a formula may hold this word: a number, or one letter."""
    return piece[:1].isdigit() or (len(piece) == 1 and piece.isalpha())


def _is_symbol(piece: str) -> bool:
    return len(piece) == 1 and (piece in _KEPT or unicodedata.category(piece) in ("Sm", "Sc", "So"))


def _in(piece: str, signs: str) -> bool:
    return piece != "" and piece in signs


def _carries_meaning(pieces: _Pieces, at: int, last: str) -> bool:
    """Whether the sign with the index `at` carries meaning. last: the last piece before it that is kept."""
    sign = pieces.found[at]
    if _is_symbol(sign):
        return True
    before, after = pieces.at(at - 1), pieces.at(at + 1)
    after_word = pieces.touch(at) and _is_word(before)  # nothing between a word and the sign
    if sign == "#":
        return after_word or (pieces.touch(at + 1) and after[:1].isdigit())
    follows = before != "" and last == before and (_is_operand(before) or not _is_word(before))
    if sign in _OPERATORS:
        leads = _is_operand(after) or _in(after, "([{" + _OPERATORS)
        negative = sign == "-" and pieces.touch(at + 1) and _is_operand(after)
        return (follows and leads) or (negative and not after_word)
    if sign in _BRACKETS:
        return any(side[:1].isdigit() or _is_symbol(side) or _in(side, _OPERATORS) for side in (before, after))
    if sign == "!":  # a negation or a factorial, not the end of a sentence
        if pieces.touch(at + 1) and after == "=":
            return True
        if pieces.touch(at + 1) and _is_word(after):
            return not after_word
        return pieces.touch(at) and follows and (_is_symbol(after) or _in(after, _OPERATORS + _BRACKETS))
    return False
