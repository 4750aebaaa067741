"""The target `hf`: a folder that transformers, vLLM, SGLang and MLX load, with the prompts as vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from embedgrad.exports.hf_config import write_configs
from embedgrad.exports.hf_tokenizer import write_tokenizer
from embedgrad.exports.hf_weights import convert_weights, copy_weights, link, rounding
from embedgrad.exports.model_card import hf_card
from embedgrad.exports.source import NamedPrompt, Source
from embedgrad.exports.vocabulary import Vocabulary
from embedgrad.util.errors import ExportError

_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")


def write_hf(
    source: Source, prompts: Sequence[NamedPrompt], out: Path, *, untie: bool, dtype: torch.dtype
) -> tuple[Vocabulary, dict[str, Any]]:
    """Writes the folder `out`, which exists and is empty. Of a multimodal model the copy is the text part.

    dtype: type of the weights where the model is a GGUF file; a folder's tensors keep theirs. Returns the new
    vocabulary and facts about the copy. Raises ExportError, SaveError.
    """
    words = write_tokenizer(source, prompts, out)
    stored = source.table.dtype if source.gguf is None else dtype
    error = rounding(words.embeddings, stored)
    if error == float("inf"):
        raise ExportError(f"a row of the prompt is too large for the embedding table's type, {_type(stored)}.")
    write_configs(source, words, out, untie, dtype)
    if source.gguf is None:
        copy_weights(source, words, out, untie)
        for pattern in _LICENCES:
            for path in source.path.glob(pattern):
                if path.is_file():
                    link(path, out / path.name)
    else:
        convert_weights(source, words, out, untie, dtype)
    facts = {
        "type of the embedding table": _type(stored),
        "rows": words.rows,
        "new tokens": len(words.ids),
        "largest relative rounding error of a prompt row": error,
        "head": "tied" if source.tied and not untie else "untied",
    }
    if source.is_composite:
        facts["part of the model"] = "its text part, as a model of its own"
    (out / "README.md").write_text(hf_card(source, prompts, words, facts), encoding="utf-8")
    return words, facts


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
