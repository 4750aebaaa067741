"""The tokens that a readable text may hold, and the texts that keep their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedgrad.engine.model import Model
from embedgrad.prompt.rendering import prompt_tokens
from embedgrad.prompt.template import Template
from embedgrad.util.errors import EmbedGradError
from embedgrad.util.memo import PerObject

_KNOWN: PerObject[Tensor] = PerObject()
_BROKEN = "\ufffd"  # of bytes that are no character


def text_tokens(model: Model) -> Tensor:
    """Which rows of the embedding table may stand in a text, [V] bool.

    Left out: ids without a token, control tokens, parts of characters, and what is neither printable nor a space.
    """
    return _KNOWN.get(model, "text", lambda: _text_tokens(model))


def _text_tokens(model: Model) -> Tensor:
    usable = torch.zeros(len(model.weights.embedding), dtype=torch.bool)
    tokenizer = model.tokenizer
    for id in range(min(len(usable), tokenizer.vocab_size)):
        text = tokenizer.decode([id], skip_special=True)  # empty for a control token
        plain = text.strip(" ")
        usable[id] = bool(plain) and plain.isprintable() and _BROKEN not in text and not tokenizer.controls.within(text)
    return usable


def text_of(model: Model, template: Template, ids: Sequence[int]) -> str | None:
    """The text of `ids` where it is one that becomes exactly these tokens as a prompt; else None.

    A text with white space at an end gives None, because copying may lose it.
    """
    text = model.tokenizer.decode(list(ids), skip_special=False)
    if not text or text != text.strip() or _BROKEN in text:
        return None
    try:
        return text if prompt_tokens(model, template, text) == list(ids) else None
    except EmbedGradError:
        return None
