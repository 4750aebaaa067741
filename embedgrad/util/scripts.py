"""Which characters make words, in any script: for comparing texts and for finding a word in running text.

Python's `\\w` leaves out combining marks, among them the vowel signs of Indic scripts. And some scripts put no space
between words, so that a word's end cannot be seen.
"""

from __future__ import annotations

import sys
import unicodedata
from functools import cache

# Blocks of scripts that are written without spaces between words (Unicode 15; inside a regular expression's class).
SPACELESS = (
    "\u0e00-\u0fff"  # Thai, Lao, Tibetan
    "\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f"  # Burmese, Khmer, Tai scripts, Balinese
    "\ua980-\ua9ff\uaa60-\uaadf"  # Javanese, more Burmese, Tai Viet
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303b"  # Han radicals, iteration marks, numerals
    "\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f\U0001b000-\U0001b16f"  # kana, bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Han
    "\ua000-\ua4cf"  # Yi
)
# Korean puts spaces between phrases; particles follow a word without one.
HANGUL = "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff"
_VARIANTS = "\ufe0e\ufe0f"  # how an emoji is drawn; they are marks, but change no meaning


@cache
def marks() -> str:
    """All combining marks, as ranges of a regular expression's class."""
    found = [
        code for code in range(0x300, sys.maxunicode + 1)
        if unicodedata.category(chr(code))[0] == "M" and chr(code) not in _VARIANTS and code < 0xE0000
    ]  # fmt: skip
    ranges: list[list[int]] = []
    for code in found:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{chr(low)}-{chr(high)}" for low, high in ranges)
