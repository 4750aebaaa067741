"""Tokenises text in which only the template's control tokens count; those that the data spell out are plain text.

`tokenizers` recognises a control token wherever its text stands. So this module gives every control token a stand-in,
one private-use character, in a copy of the tokenizer, which then takes the tokens' own texts for ordinary text. What
surrounds a stand-in is tokenised as it is around the token itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken

from embedgrad.util.errors import DataError

_FIRST = 0xF0000  # plane 15, whose characters are for private use; conversations mark places with those of plane 0
_MOST = 0xFFFE
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def control_tokens(backend: tokenizers.Tokenizer) -> dict[str, int]:
    """The special tokens of a tokenizer, {text: id}, without those that stand for a byte (some mark them special)."""
    return {
        token.content: id
        for id, token in backend.get_added_tokens_decoder().items()
        if token.special and not _BYTE.fullmatch(token.content)
    }


class ControlTokens:
    """The control tokens of a tokenizer, as texts."""

    def __init__(self, tokens: dict[str, int]) -> None:
        self.ids = {text: id for text, id in tokens.items() if text}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def within(self, text: str) -> list[str]:
        """The control tokens whose texts stand in `text`, each once, in their order."""
        return [] if self._pattern is None else list(dict.fromkeys(self._pattern.findall(text)))

    def replaced(self, text: str, replacement: Callable[[str], str]) -> str:
        """`text` with replacement(token) for each control token's text."""
        return text if self._pattern is None else self._pattern.sub(lambda match: replacement(match[0]), text)


def _unknown(model: dict[str, Any]) -> str | None:
    """The token of what the vocabulary does not hold; None where there is none."""
    number = model.get("unk_id")  # of a Unigram model, whose vocabulary is a list of (text, score)
    return model["vocab"][number][0] if isinstance(number, int) else model.get("unk_token")


class LiteralTokenizer:
    """Encodes text whose control tokens are stand-ins (`escape`); the tokens' own texts are ordinary text."""

    def __init__(self, backend: tokenizers.Tokenizer, controls: ControlTokens) -> None:
        self._controls = controls
        self._decode_with = backend
        self._stand_ins = {text: chr(_FIRST + number % _MOST) for number, text in enumerate(controls.ids)}
        added = backend.get_added_tokens_decoder()
        table = json.loads(backend.to_str())
        table["added_tokens"] = []
        copy = tokenizers.Tokenizer.from_str(json.dumps(table))
        copy.no_truncation()
        copy.no_padding()
        self._backend = copy
        unknown = _unknown(table["model"])
        # A vocabulary that holds the texts of control tokens might make them of ordinary text.
        self._never = {id for text, id in controls.ids.items() if text != unknown and copy.token_to_id(text) == id}
        self._ids: dict[int, int] = {}  # id in the copy → id
        for id, token in sorted(added.items()):
            content = self._stand_ins.get(token.content, token.content)
            flags = {
                name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            copy.add_tokens([AddedToken(content, **flags)])
            own = copy.token_to_id(content)
            if own is not None:
                self._ids[own] = id

    def escape(self, text: str) -> str:
        """`text` with the stand-in of each control token in it. Raises DataError where it has stand-ins already."""
        if any(_FIRST <= ord(character) < _FIRST + _MOST for character in text):
            raise DataError("the text has characters of Unicode's private-use plane 15 beside control tokens.")
        return self._controls.replaced(text, self._stand_ins.__getitem__)

    def escape_around(self, text: str, places: Mapping[str, str]) -> str:
        """`escape`, and then the text of the control token `token` for each places[token]: there it is ordinary text.

        A template is rendered with the places, so that its own control tokens can be told from those of data.
        """
        restored = str.maketrans({place: token for token, place in places.items()})
        return self.escape(text).translate(restored)

    def encode(self, text: str) -> list[int]:
        """As `Tokenizer.encode`, for text with stand-ins."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `Tokenizer.encode_with_offsets`, for text with stand-ins, in whose characters the offsets count."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        if not self._never.isdisjoint(encoding.ids):
            raise DataError("the text of a control token has no ordinary tokens in this tokenizer; leave it out.")
        ids = [self._ids.get(id, id) for id in encoding.ids]
        return ids, [(int(start), int(end)) for start, end in encoding.offsets]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """As `Tokenizer.decode`."""
        return str(self._decode_with.decode(list(ids), skip_special_tokens=skip_special))

    def token(self, id: int) -> str:
        """As `Tokenizer.token`."""
        return self._decode_with.id_to_token(id) or ""
