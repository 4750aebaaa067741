"""The tokens that two vocabularies share: those of exactly the same bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from embedgrad.model.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # SentencePiece's sign for a space
_ENOUGH = 0.99  # share of the tokens that are spelled in the byte alphabet, from which on a vocabulary is of that kind


def _alphabet() -> dict[str, int]:
    """The byte of each character in the alphabet of byte-level BPE: printable bytes stand for themselves, the others
    are the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _alphabet()


def token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The bytes of every token by its id, without control tokens. A space before a word is part of its token."""
    spelled = {
        id: text
        for id in range(tokenizer.vocab_size)
        if (text := tokenizer.token(id)) and not tokenizer.controls.within(text)
    }
    in_alphabet = sum(all(sign in _BYTES for sign in text) for text in spelled.values())
    byte_level = in_alphabet >= _ENOUGH * max(1, len(spelled))
    return {id: _read(text, byte_level) for id, text in spelled.items()}


def _read(text: str, byte_level: bool) -> bytes:
    if byte_level:
        return bytes(_BYTES[sign] for sign in text) if all(sign in _BYTES for sign in text) else text.encode()
    byte = _BYTE.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte is not None else text.replace(_SPACE, " ").encode("utf-8", "replace")


def shared_tokens(one: Tokenizer, other: Tokenizer) -> list[tuple[int, int]]:
    """(id in `one`, id in `other`) of every token that both have, in the order of `one`. Of tokens with the same bytes
    the smallest id counts."""
    theirs = dict(_first(other))
    return [(id, theirs[text]) for text, id in _first(one) if text in theirs]


def _first(tokenizer: Tokenizer) -> Iterator[tuple[bytes, int]]:
    seen: set[bytes] = set()
    for id, text in token_bytes(tokenizer).items():
        if text not in seen:
            seen.add(text)
            yield text, id
