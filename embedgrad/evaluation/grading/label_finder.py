"""Finds labels in running text of any script.

A label counts where it stands as a word of its own. In scripts without spaces between words (Chinese, Japanese, Thai)
it may stand anywhere; a Korean label may be followed by particles. A label of one letter is found as an answer is
given: the whole text, a letter after words such as "the answer is", or a letter as the label spells it. The English
article "a" and the pronoun "I", and other letters that are words, are not answers where a sentence goes on behind them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from embedgrad.util.scripts import HANGUL, SPACELESS, marks

_CUES = (
    "answer|option|choice|choose|select|pick|correct|label|class|category|respuesta|opción|réponse|option|antwort|"
    "resposta|risposta|odpowiedź|ответ|вариант|cevap|jawaban|الجواب|الإجابة|उत्तर|答案|选项|選項|选择|選擇|选|選|答え|正解|答|"
    "정답|답변|답|คำตอบ|คำตอบคือ"
)
_LINKS = (
    "is|are|be|would|should|must|option|letter|answer|choice|es|la|est|ist|é|è|to|jest|это|adalah|है|是|为|為|应该|应|は|が|"
    "은|는|คือ|the|correct"
)
# What follows a letter that is an answer, and does not follow it as a word: "A is right", "A because", "A and B".
_GOES_ON = "is|was|because|since|and|or|as|seems|looks|fits|would|must|has|est|es|ist|é|è"
_PRONOUN_GOES_ON = "is|because|since"
_WORDS_OF_ONE_LETTER = frozenset("aeiouyàéèóú" + "авиоксуя")
_AROUND = " \t\r\n.,:;!?()[]{}<>*_`'\"“”‘’。．「」『』【】（）"  # signs that may surround an answer that is one letter
_SPACED = rf"[^\W{SPACELESS}{HANGUL}]"  # letters and digits of scripts with spaces between words, without Korean


class Found(NamedTuple):
    """A label in a text. written: as it stands there. label: as it was given."""

    written: str
    label: str


class LabelFinder:
    """Finds the labels of one task."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = {_normal(label).casefold(): label for label in reversed(labels)}  # of equal ones the first
        texts = list(dict.fromkeys(map(_normal, labels)))
        self._letters = {text for text in texts if len(text) == 1 and text.lower() != text.upper()}
        self._others = [re.compile(_as_word(text), re.IGNORECASE) for text in texts if text not in self._letters]

    def find(self, text: str, last: bool) -> Found | None:
        """The first (or last) label in `text`; None where there is none."""
        text = _normal(text)
        candidates = [(2, match.start(), match[0]) for match in self._longest(text)]
        if self._letters:
            candidates += self._letters_in(text)
        if not candidates:
            return None
        best = min(rank for rank, _, _ in candidates)
        chosen = sorted((at, written) for rank, at, written in candidates if rank == best)
        written = chosen[-1 if last else 0][1]
        return Found(written, self._labels[written.casefold()])

    def _longest(self, text: str) -> list[re.Match[str]]:
        """The labels in `text`. Of two that overlap the longer one counts: "not sure", not "not"."""
        matches = [match for pattern in self._others for match in pattern.finditer(text)]
        kept: list[re.Match[str]] = []
        for match in sorted(matches, key=lambda match: (match.start() - match.end(), match.start())):
            if all(match.end() <= other.start() or other.end() <= match.start() for other in kept):
                kept.append(match)
        return kept

    def _letters_in(self, text: str) -> list[tuple[int, int, str]]:
        """(rank, place, letter as written) wherever a letter may be meant; the lowest rank is the surest."""
        wanted = {letter.casefold() for letter in self._letters}
        bare = text.strip(_AROUND)
        if bare.casefold() in wanted:
            return [(0, 0, bare)]
        found = []
        for match in _letter().finditer(text):
            letter = match[0]
            if letter.casefold() not in wanted or _is_word_there(letter, text[match.end() :]):
                continue
            if _cue().search(text, 0, match.start()):
                found.append((1, match.start(), letter))
            elif letter in self._letters or letter.lower() in self._letters:
                found.append((2, match.start(), letter))
        return found


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _is_word_there(letter: str, behind: str) -> bool:
    """Whether a letter that may be a word is one: a sentence in small letters goes on behind it."""
    if letter.casefold() not in _WORDS_OF_ONE_LETTER:
        return False
    goes_on = re.match(r"\s+([^\W\d_]+)", behind)
    if goes_on is None or not goes_on[1][0].islower():
        return False
    return goes_on[1] not in (_PRONOUN_GOES_ON if letter in "Ii" else _GOES_ON).split("|")


@cache
def _letter() -> re.Pattern[str]:
    """A letter that stands alone: not in a word, not in "I'm", "A-level", "U.S." or "C++"."""
    return re.compile(
        rf"(?<!{_SPACED})(?<![{marks()}])(?<!\w['’])(?<!\w[.-])[^\W\d_{SPACELESS}{HANGUL}]"
        rf"(?!{_SPACED}|[{marks()}])(?![+#])(?!['’]\w)(?![.-][^\W\d_])"
    )


@cache
def _cue() -> re.Pattern[str]:
    """Words that announce an answer, at the end of the text before it."""
    between = r"[\s:：=,，\"'“‘(\[{（「【*_`\\$]"
    link = rf"{between}*(?:{_LINKS})(?!{_SPACED})"
    return re.compile(rf"(?:(?<!{_SPACED})(?:{_CUES})(?:{link})*{between}*|boxed\{{)\Z", re.IGNORECASE)


def _as_word(label: str) -> str:
    """A regular expression for `label` as a word of its own."""
    mark, before, after = f"[{marks()}]", "", ""
    if re.match(f"[{HANGUL}]", label):
        before = f"(?<![{HANGUL}])"
    elif re.match(_SPACED, label):
        before = f"(?<!{_SPACED})(?<!{mark})" + (r"(?<!\d[.,])" if label[0].isdigit() else "")
    if re.match(rf"[{SPACELESS}{HANGUL}]", label[-1]):
        after = f"(?!{mark})"
    elif re.match(rf"\w|{mark}", label[-1]):
        after = f"(?!{_SPACED}|{mark})" + (r"(?![.,]\d)" if label[-1].isdigit() else "")
    return f"{before}{re.escape(label)}{after}"
