"""Turns an answer's tokens into pieces of text that can be sent at once."""

from __future__ import annotations

from collections.abc import Sequence

from embedgrad.model.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # what an incomplete UTF-8 character decodes to


class TextStream:
    """The text of a growing answer.

    A character is given when all its bytes are there. What could be the beginning of a stop text is held back. Only the
    last tokens are decoded again: a token's text can depend on the one before it (a space, bytes of a character).
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []  # the last tokens
        self._read = 0  # how many of them have been given as text
        self._held = ""
        self._stopped = False
        self.sent = 0  # characters given so far

    def add(self, token: int) -> str:
        """The text that one more token makes certain."""
        if self._stopped:
            return ""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[: self._read])
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_INCOMPLETE):
            return ""
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        return self._give(self._held + text[len(before) :])

    def end(self, text: str) -> str:
        """The rest of the whole answer `text`."""
        rest = text[self.sent :]
        self.sent = len(text)
        return rest

    def _give(self, text: str) -> str:
        places = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if places:
            self._stopped, self._held = True, ""
            certain = text[: min(places)]
        else:
            keep = max((_overlap(text, stop) for stop in self._stops), default=0)
            certain, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.sent += len(certain)
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
