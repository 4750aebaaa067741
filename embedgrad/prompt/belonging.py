"""Whether a prompt belongs to a model, and whether it stands where it was made.

The embedding rows of the prompt's ids must be those of the model. They count as equal if one is the other rounded to
bfloat16: it is the same model, loaded in another type. So a prompt that was made in one type can be used in the other.
The fingerprint tells fine-tunes of the model, which may have the same rows. Where the chat template or the tokenizer
was changed, other tokens than `layout_ids` surround the prompt; that is said in a LayoutWarning.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
from typing import Protocol

import torch

from embedgrad.model.fingerprint import Fingerprint
from embedgrad.prompt.rendering import ModelLike, PromptLike, layout
from embedgrad.util.errors import EmbedGradError, PromptError
from embedgrad.util.memo import PerObject

_PROBLEMS: PerObject[str] = PerObject()
_LAYOUTS: PerObject[str] = PerObject()


class LayoutWarning(UserWarning):
    """A prompt is used behind other tokens than those it was made behind."""


class PromptModel(ModelLike, Protocol):
    """The part of a model that a prompt needs. It may also have `fingerprint`."""

    def embedding_rows(self, ids: list[int], /) -> torch.Tensor:
        """Rows of the embedding table, [n, d] float32 on the CPU."""
        ...


class MadePrompt(PromptLike, Protocol):
    """The part of a `SoftPrompt` that says for what it was made."""

    @property
    def anchor(self) -> torch.Tensor: ...

    @property
    def anchor_hash(self) -> str: ...

    @property
    def model_name(self) -> str: ...

    @property
    def fingerprint(self) -> Fingerprint | None: ...

    @property
    def layout_ids(self) -> list[int]: ...

    @property
    def layout_rows(self) -> list[int]: ...


def check(prompt: MadePrompt, model: PromptModel) -> None:
    """Raises PromptError where the prompt was made for another model, and gives a LayoutWarning for another layout."""
    key = (prompt.anchor_hash, tuple(prompt.token_ids), prompt.anchor.shape[1], prompt.fingerprint)
    problem = _PROBLEMS.get(model, key, lambda: _problem(prompt, model))
    if problem:
        raise PromptError(problem)
    if prompt.layout_ids:
        place = (prompt.template, prompt.text, *(tuple(x) for x in (prompt.layout_ids, prompt.layout_rows)))
        moved = _LAYOUTS.get(model, place, lambda: _moved(prompt, model))
        if moved:
            warnings.warn(moved, LayoutWarning, stacklevel=4)


def _problem(prompt: MadePrompt, model: PromptModel) -> str:
    made = f"the prompt was made for the model {prompt.model_name}"
    width, vocab_size = int(model.config.hidden_size), int(model.config.vocab_size)
    if width != prompt.anchor.shape[1]:
        return f"{made} with hidden size {prompt.anchor.shape[1]}; {model.name} has hidden size {width}."
    if max(prompt.token_ids) >= vocab_size:
        return f"{made} and has the token id {max(prompt.token_ids)}; {model.name} has {vocab_size} ids only."
    rows = model.embedding_rows(list(prompt.token_ids))
    if hash_rows(rows) != prompt.anchor_hash and not _equal_but_rounded(rows, prompt.anchor):
        return f"{made}, whose embedding rows are not those of {model.name}; use it with the model it was made for."
    fingerprint = getattr(model, "fingerprint", None)
    if fingerprint is not None and prompt.fingerprint is not None and prompt.fingerprint.differs(fingerprint):
        return (
            f"{made}; {model.name} has its embedding rows and other layers (a fine-tune, for instance): use it "
            f"with the model it was made for."
        )
    return ""


def _moved(prompt: MadePrompt, model: PromptModel) -> str:
    """How the tokens around the prompt differ from those it was made behind, in one sentence; "" for equal ones."""
    try:
        ids, rows = layout(model, prompt.template, prompt.token_ids, prompt.text)
    except EmbedGradError as error:
        return f"the prompt's template cannot be used with {model.name}: {error}"
    if (ids, rows) == (prompt.layout_ids, prompt.layout_rows):
        return ""
    pairs = zip(zip(ids, rows, strict=True), zip(prompt.layout_ids, prompt.layout_rows, strict=True), strict=False)
    same = next((at for at, (now, then) in enumerate(pairs) if now != then), min(len(ids), len(prompt.layout_ids)))
    told = [_excerpt(model, part[max(0, same - 4) : same + 8]) for part in (prompt.layout_ids, ids)]
    return (
        f"other tokens stand around the prompt than when it was made: {told[0]} then, {told[1]} now; the chat "
        f"template or the tokenizer of {model.name} was changed, and the prompt may do worse."
    )


def fits(ids: list[int], rows: list[int], token_ids: list[int]) -> bool:
    """Whether a layout shows the prompt's rows whole and in order, with their ids, and nothing else out of range."""
    if len(ids) != len(rows) or min(ids, default=0) < -1:
        return False
    shown = [(row, id) for row, id in zip(rows, ids, strict=True) if row != -1]
    times, rest = divmod(len(shown), len(token_ids))
    return not rest and shown == [*enumerate(token_ids)] * times


def _excerpt(model: PromptModel, ids: list[int]) -> str:
    pieces = ["{query}" if id < 0 else model.tokenizer.decode([id], skip_special=False) for id in ids]
    return repr("".join(pieces)[:60])


def hash_rows(rows: torch.Tensor) -> str:
    """sha256 (hexadecimal) of a matrix: its two sizes as little-endian int64, then its elements as little-endian
    float32."""
    matrix = rows.detach().to("cpu", torch.float32).contiguous()
    digest = hashlib.sha256(struct.pack("<qq", *matrix.shape))
    digest.update(matrix.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _equal_but_rounded(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether one of two float32 matrices is equal to the other rounded to bfloat16."""
    return torch.equal(one, other.bfloat16().float()) or torch.equal(other, one.bfloat16().float())
