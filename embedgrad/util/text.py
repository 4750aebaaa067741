"""One reader for texts that people write: configurations, prompts, data and queries, from files and from stdin.

They are UTF-8. A byte-order mark in front and carriage returns before line feeds are not part of the text.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from embedgrad.util.errors import EmbedGradError

_OTHERS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


class NotUtf8(ValueError):
    """Bytes that are not UTF-8; the message continues a sentence that begins with their name."""


def decoded(data: bytes, first: bool = True, unit: str = "text") -> str:
    """`data` as text, with its line ends as they are. first: it begins the text, so a byte-order mark is removed.

    unit: what a byte is counted in, for messages. Raises NotUtf8.
    """
    if first:
        for mark, name in _OTHERS.items():  # the longer marks come first: UTF-32's begins with UTF-16's
            if data.startswith(mark):
                raise NotUtf8(f"is {name} text, not UTF-8; save it as UTF-8")
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise NotUtf8(f"is not UTF-8 (byte {error.start + 1} of the {unit})") from None


def with_line_feeds(text: str) -> str:
    """`text` whose lines end with line feeds, as Python's own text files give it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def without_final_break(text: str) -> str:
    """`text` less one line break at its end, which editors and YAML's block scalars add."""
    return text.removesuffix("\n").removesuffix("\r")


def read_text(path: str | os.PathLike[str], what: str, error: type[EmbedGradError]) -> str:
    """The text of a file, with line feeds. `what` names its kind in messages ("the prompt file"). Raises `error`."""
    try:
        return with_line_feeds(decoded(Path(path).read_bytes()))
    except NotUtf8 as wrong:
        raise error(f"{what} {path} {wrong}.") from None
    except (OSError, ValueError) as wrong:
        reason = wrong.strerror if isinstance(wrong, OSError) else wrong
        raise error(f"cannot read {what} {path}: {reason}.") from wrong


def numbered_lines(lines: Iterable[bytes], name: str, error: type[EmbedGradError]) -> Iterator[tuple[str, str]]:
    """("NAME, line N", text) for each line that is not blank. Only line feeds end a line. Raises `error`."""
    for number, line in enumerate(lines, 1):
        where = f"{name}, line {number}"
        try:
            text = decoded(line, number == 1, "line")
        except NotUtf8 as wrong:
            raise error(f"{where} {wrong}.") from None
        if text.strip():
            yield where, text.rstrip("\r\n")
