"""Values and texts of files as people may see them: never longer than a line or two, and nothing a terminal obeys."""

from __future__ import annotations

import re
import reprlib

LONGEST = 200  # characters of a value in a message
_MOST_BITS = 256  # of a whole number that is written out
# Control characters (ESC begins a terminal's commands), two separators that some programs take for line ends, and
# halves of surrogate pairs, which no encoding has. Tabs and line feeds are not among them.
_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
_DIRECTIONS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # they change the direction of the text around them
_CONTROL, _OBEYED = re.compile(f"[{_CONTROLS}]"), re.compile(f"[{_CONTROLS}{_DIRECTIONS}]")


class _Repr(reprlib.Repr):
    """`repr` that never walks over more of a value than it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = LONGEST - 40
        self.maxlevel = 4

    def repr_int(self, x: int, level: int) -> str:
        """The number, or about how many digits it has: Python refuses to write very long ones."""
        if x.bit_length() <= _MOST_BITS:
            return repr(x)
        return f"a whole number of some {int(x.bit_length() * 0.30103) + 1:,} digits"


_REPR = _Repr()


def short(value: object, longest: int = LONGEST) -> str:
    """`value` as text for a message, at most `longest` characters."""
    try:
        text = visible(_REPR.repr(value))
    except (RecursionError, ValueError):
        text = type(value).__name__
    return cut(text, longest)


def cut(text: str, longest: int) -> str:
    """`text`, without its middle where it has more than `longest` characters."""
    if len(text) <= longest:
        return text
    end = (longest - 5) // 3
    return f"{text[: longest - 5 - end]} ... {text[len(text) - end :]}"


def visible(text: str) -> str:
    """`text` with what a terminal would obey written as an escape, such as \\x1b; line feeds and tabs are kept."""
    return _OBEYED.sub(lambda found: _escape(ord(found[0])), text)


def without_controls(text: str) -> str:
    """`visible(text)` that keeps the signs for the direction of writing."""
    return _CONTROL.sub(lambda found: _escape(ord(found[0])), text)


def one_line(text: str) -> str:
    """`visible(text)` without line breaks."""
    return re.sub(r"\s*\n\s*", " ", visible(text))


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
