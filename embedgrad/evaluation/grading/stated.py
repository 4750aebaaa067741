"""What a text says that its answer is: in a box, after "####", or after words such as "the answer is"."""

from __future__ import annotations

import re

_COMMANDS = re.compile(r"\\(?:boxed|fbox)(?:\s*(\{)|\s+([^\s${}\\]+))")
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*\S)")
_ANSWER = (
    "answer|respuesta|réponse|antwort|resposta|risposta|odpowiedź|odpověď|ответ|відповідь|cevap|jawaban|svar|vastaus|"
    "الجواب|الإجابة|התשובה|उत्तर|جواب|คำตอบ|đáp án|答案|答え|正解|解答|答|정답|답"
)
_IS = "is|es|est|ist|é|è|to|je|это|є|adalah|är|on|هو|هي|היא|है|ہے|คือ|là|应该是|應該是|是|为|為|等于|等於|は|が|은|는|이"
# An expression: it begins as one does, and ends with the line, with a full stop, or before words that go on.
_SAID = re.compile(
    rf"(?:{_ANSWER})[\s*_]*(?:(?:{_IS})[\s*_]*)?[:：=＝]?[\s*_]*"
    r"(?P<said>(?:[-+−]?[$€£¥]?[\d.]|[-+−]?\\|\$|[-+−]?[(\[{√]|[a-zA-Zα-ω](?![^\W\d_]))[^\n。！？]*)",
    re.IGNORECASE,
)
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|textit|mbox|operatorname)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_FEW = 3


def last_boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{…} (or \\fbox{…}, or "\\boxed 7") in `text`, with matched braces.

    None where there is none or the last one is empty.
    """
    found = None
    for match in _COMMANDS.finditer(text):
        content = match[2] if match[1] is None else _braced(text, match.end())
        if content is not None:
            found = content
    return found if found is not None and found.strip() else None


def _braced(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes the one before `start`; None where no brace closes it."""
    depth, at = 1, start
    while at < len(text):
        if text[at] == "\\":  # \{ and \} are not braces
            at += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
        at += 1
    return None


def stated(text: str, words: bool = True) -> str | None:
    """The answer that `text` states; None where it states none. words: also after words such as "the answer is"."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    lines = [match[1].strip() for match in _HASHES.finditer(text)]
    last = text.rstrip().rpartition("\n")[2]
    for line in reversed(lines):  # "#### Step 2" in the middle of a text is a heading
        if is_bare(line) or last.endswith(line):
            return line
    return said(text) if words else None


def said(text: str) -> str | None:
    """What follows the last words such as "the answer is"; None where there is none, or no expression."""
    found = [match["said"].strip().removesuffix(".").strip() for match in _SAID.finditer(text)]
    return found[-1] if found and found[-1] else None


def is_bare(text: str) -> bool:
    """Whether `text` is one line with an expression and no words."""
    text = text.strip()
    return bool(text) and "\n" not in text and "boxed" not in text and not _WORD.search(_LATEX_TEXT.sub(" ", text))


def few_words(text: str) -> bool:
    """Whether `text` is one line of at most 3 words beside its expressions, as an answer may be and no sentence is."""
    text = text.strip()
    return bool(text) and "\n" not in text and len(_WORD.findall(_LATEX_TEXT.sub(" ", text))) <= _FEW
