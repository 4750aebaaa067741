"""Next-token logits of our own engine, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedgrad.engine.model import Model, load_model
from embedgrad.exports.source import Source
from embedgrad.generation.prefill import prefill_prefix, prefill_suffixes
from embedgrad.prompt.rendering import Rendered


def engine(source: Source) -> Model:
    """The model with all weights in float32 on the CPU."""
    return load_model(source.path, dtype="float32", device="cpu", weights="fp32")


def next_logits(model: Model, embeddings: Tensor, rendered: Sequence[Rendered]) -> Tensor:
    """Logits [n, V] for the token after each sequence, with the prompt rows `embeddings` [k, d]."""
    rows = []
    for sequence in rendered:
        with model.lock:
            prefix = prefill_prefix(model, embeddings, sequence, len(sequence.ids) - 1)
            _, logits = prefill_suffixes(model, embeddings, [sequence], prefix)
        rows.append(logits[0].float())
    return torch.stack(rows)
