"""What the steps of a tokenizer.json may do: the same for the same text, for every text, without blowing it up."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import models

from embedgrad.util.errors import ModelError
from embedgrad.util.shown import short

# Factor by which all steps of one kind together may lengthen a text. Unicode's own normal forms are not counted: their
# longest, NFKC's 18 characters for one, is reached once. Published tokenizers stay below 20.
LARGEST_GROWTH = 256
LARGEST_PREFIX = 1024  # characters that all `Prepend` steps together may put in front of a text


def check_steps(backend: tokenizers.Tokenizer, where: str) -> None:
    """Raises ModelError for a tokenizer that is random, that fails on some texts, or that makes texts much longer."""
    model = backend.model
    if isinstance(model, models.BPE) and model.dropout:
        raise ModelError(
            f"{where}: its BPE leaves out merges at random (dropout {model.dropout:g}), so that a text has no fixed "
            'tokens; set "dropout" to null.'
        )
    unknown = getattr(model, "unk_token", None)
    if isinstance(model, (models.WordPiece, models.WordLevel)) and model.token_to_id(unknown or "") is None:
        raise ModelError(
            f"{where}: its {type(model).__name__} has no token {short(unknown)} for unknown words, so that it fails on "
            "texts that hold one; add that token to the vocabulary."
        )
    for name, step in (
        ("normalizer", backend.normalizer), ("pre-tokenizer", backend.pre_tokenizer), ("decoder", backend.decoder),
    ):  # fmt: skip
        if step is not None:
            _check_growth(list(_single_steps(json.loads(step.__getstate__()))), f"{where}: its {name}")


def _check_growth(steps: list[Mapping[str, Any]], what: str) -> None:
    growth, prefix = 1.0, 0
    for step in steps:
        growth *= _growth(step)
        prefix += len(step["prepend"]) if step.get("type") == "Prepend" else 0
        if growth > LARGEST_GROWTH:
            raise ModelError(
                f"{what} makes a text up to {growth:,.0f} times as long (at its step {step.get('type')}); "
                f"{LARGEST_GROWTH} times is the most that is read."
            )
        if prefix > LARGEST_PREFIX:
            raise ModelError(
                f"{what} puts {prefix:,} characters in front of a text; {LARGEST_PREFIX:,} is the most that is read."
            )


def _single_steps(step: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a sequence, however it is nested, in their order."""
    for name in ("normalizers", "pretokenizers", "decoders"):
        if isinstance(step, Mapping) and isinstance(step.get(name), list):
            for inner in step[name]:
                yield from _single_steps(inner)
            return
    if isinstance(step, Mapping):
        yield step


def _growth(step: Mapping[str, Any]) -> float:
    """Upper bound for the number of characters that come out of a step for each that goes in."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return 4.0  # a character has up to four bytes, each of which becomes one
    if kind == "Replace":
        pattern, content = step.get("pattern"), len(step.get("content") or "")
        literal = pattern.get("String") if isinstance(pattern, Mapping) else None
        if literal:
            return max(1.0, content / len(literal))
        return content + 1.0  # a regular expression may match between any two characters
    if kind == "Precompiled":
        return float(max(1, _longest_replacement(step.get("precompiled_charsmap"))))
    return 1.0


def _longest_replacement(charsmap: Any) -> int:
    """Bytes of the longest text in SentencePiece's table: a trie behind its size in bytes, then texts that end in 0."""
    data = base64.b64decode(charsmap or "")
    if len(data) < 4:
        return 0
    (size,) = struct.unpack_from("<I", data)
    return max(map(len, data[4 + size :].split(b"\0")))
