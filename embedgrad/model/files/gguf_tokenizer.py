"""Builds a BPE of the `tokenizers` package from GGUF metadata.

`tokenizer.ggml.model` is gpt2 (byte-level BPE; `tokenizer.ggml.pre` names the pre-tokenizer) or llama (SentencePiece
BPE with byte fallback). Any other model or pre-tokenizer raises a ModelError with its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from embedgrad.util.errors import ModelError
from embedgrad.util.shown import short

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_MARKS_AND_SPACE}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_MARKS_AND_SPACE}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_MARKS_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_MARKS_WITH_SLASH}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_MARKS_WITH_SLASH}"
# llama.cpp's pre-tokenizer for files that name none.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


SPLITS = {
    "gpt-2": lambda: [_byte_level(True)],
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), _byte_level(True)],
    "qwen2": lambda: [_split(_QWEN2), _byte_level(False)],
    "llama-bpe": lambda: [_split(_LLAMA3), _byte_level(False)],
    "tekken": lambda: [_split(_TEKKEN), _byte_level(False)],
    "gpt-4o": lambda: [_split(_GPT4O), _byte_level(False)],
    "default": lambda: [*(_split(pattern) for pattern in _DEFAULT), _byte_level(False)],
}
_ALIASES = {
    "deepseek-r1-qwen": "qwen2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "llama-bpe",
    "dbrx": "llama-bpe", "refact": "smollm", "starcoder": "smollm", "olmo": "gpt-2",
}  # fmt: skip
# A word of the vocabulary is one token there, whatever the merges.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")


def build_backend(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer. `where` names the file in messages.

    Raises ModelError for an unsupported kind of tokenizer. With damaged tables the tokenizers package raises errors of
    any class.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _table(metadata, "tokens", where)
    types = _numbers(metadata, "token_type", len(tokens), where)
    vocabulary = {text: id for id, (text, type) in enumerate(zip(tokens, types, strict=True)) if type != _UNUSED}
    if kind == "gpt2":
        backend = _byte_level_bpe(metadata, vocabulary, where)
    elif kind == "llama":
        backend = _sentencepiece_bpe(metadata, tokens, types, vocabulary, where)
    else:
        raise ModelError(f"{where}: tokenizer model {short(kind)} is not supported; supported are gpt2 and llama.")
    added = [
        AddedToken(text, normalized=False, special=type != _USER_DEFINED)
        for text, type in zip(tokens, types, strict=True)
        if type in (_UNKNOWN, _CONTROL, _USER_DEFINED) and text
    ]
    backend.add_tokens(added)
    return backend


def _byte_level_bpe(metadata: Mapping[str, Any], vocabulary: dict[str, int], where: str) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    whole = name in _WHOLE_WORDS if isinstance(name, str) else False
    name = _ALIASES.get(name, name) if isinstance(name, str) else name
    if name not in SPLITS:
        raise ModelError(
            f"{where}: the text splitting {short(name)} is not supported; supported are "
            f"{', '.join([*SPLITS, *_ALIASES])}."
        )
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _table(metadata, "merges", where))]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole))
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[name]())
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], vocabulary: dict[str, int], where: str
) -> Tokenizer:
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces") or metadata.get("tokenizer.ggml.precompiled_charsmap"):
        raise ModelError(f"{where}: a SentencePiece tokenizer that normalises text is not supported.")
    scores = _numbers(metadata, "scores", len(tokens), where)
    unknown = next((text for text, type in zip(tokens, types, strict=True) if type == _UNKNOWN), None)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(tokens, types, scores, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], vocabulary: Mapping[str, int]
) -> list[tuple[str, str]]:
    """The BPE merges of a SentencePiece vocabulary, which has scores instead of merges.

    SentencePiece merges the neighbours whose joint piece has the highest score. So every split of a piece into two
    pieces of the vocabulary is a merge, and the merges are sorted by descending score. Llama-2's tokenizer.json has the
    same order.
    """
    ranked = []
    for text, type, score in zip(tokens, types, scores, strict=True):
        if type in (_UNKNOWN, _CONTROL, _UNUSED):
            continue
        for cut in range(1, len(text)):
            if text[:cut] in vocabulary and text[cut:] in vocabulary:
                ranked.append((-score, -cut, text[:cut], text[cut:]))
    ranked.sort(key=lambda item: item[:2])
    return [(left, right) for *_, left, right in ranked]


def _table(metadata: Mapping[str, Any], name: str, where: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ModelError(f"{where}: tokenizer.ggml.{name} is missing or is no list of strings.")
    return value


def _numbers(metadata: Mapping[str, Any], name: str, count: int, where: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, np.ndarray) or len(value) != count:
        raise ModelError(f"{where}: tokenizer.ggml.{name} should be {count} numbers, one for each token.")
    return value.tolist()
