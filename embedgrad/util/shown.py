"""Values and texts of files, made safe to print: at most a line or two, and nothing that a terminal obeys."""

from __future__ import annotations

import re
import reprlib
from unicodedata import bidirectional

LONGEST = 200  # characters of a value in a message
_MOST_BITS = 256  # of a whole number that is written out
# Control characters (ESC begins a terminal's commands), two separators that some programs take for line ends, and
# halves of surrogate pairs, which no encoding has. Tabs and line feeds are not among them.
_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
_DIRECTIONS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # they change the direction of the text around them
_OBEYED = re.compile(f"[{_CONTROLS}{_DIRECTIONS}]")
# Classes of signs that are written from right to left, or change the direction of others (unicodedata.bidirectional).
_TURNING = frozenset(("R", "AL", "AN", "LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))
_OPENING, _PDI = "\u2066\u2067\u2068", "\u2069"


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


def isolated(text: str) -> str:
    """`text` such that it changes the direction of nothing around it: each line that is written from right to left, or
    holds signs for the direction, stands in an isolate (Unicode Standard Annex 9, FSI and PDI)."""
    return "\n".join(_isolated(line) if _turns(line) else line for line in text.split("\n"))


def _turns(line: str) -> bool:
    return not line.isascii() and any(bidirectional(sign) in _TURNING for sign in line)


def _isolated(line: str) -> str:
    """`line` between FSI and PDI; a PDI of its own that closes nothing would end the isolate, so it is left out."""
    kept, depth = [], 0
    for sign in line:
        depth += sign in _OPENING
        if sign != _PDI or depth:
            kept.append(sign)
            depth -= sign == _PDI
    return f"\u2068{''.join(kept)}{_PDI * (depth + 1)}"


def first_line(error: BaseException) -> str:
    """What an error says, or its type where it says nothing, in one line without a full stop."""
    lines = str(error).strip().splitlines()
    return cut(lines[0].rstrip("."), LONGEST) if lines else type(error).__name__


def one_line(text: str) -> str:
    """`visible(text)` without line breaks."""
    return re.sub(r"\s*\n\s*", " ", visible(text))


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
