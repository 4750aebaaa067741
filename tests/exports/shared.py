"""Tiny models and tuned prompts that the tests of exports share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from embedgrad.exports.source import Source
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.template import Template
from tests.model.tiny import CHAT_TEMPLATE, write_folder

TEXT = "Classify the sentiment of the movie review."
DATED = "{{ 'Today is ' + strftime_now('%d %B %Y') + '.\n' }}" + CHAT_TEMPLATE
TEMPLATES = {
    "system": None,
    "user before": Template.chat([{"role": "user", "content": "{prompt}\n\n{query}"}]),
    "user after": Template.chat([{"role": "user", "content": "{query}\n\n{prompt}"}]),
    "twice": Template.chat([{"role": "user", "content": "So: {prompt} \"{query}\" - '{prompt}'"}]),
    "few-shot": Template.chat(
        [
            {"role": "system", "content": "Be {brief}. {prompt}"},
            {"role": "user", "content": "a bore"},
            {"role": "assistant", "content": "bad\\"},
            {"role": "user", "content": "{query}"},
        ]
    ),
    "dated": Template.chat(
        [{"role": "system", "content": "{prompt}"}, {"role": "user", "content": "{query}"}], chat_template=DATED
    ),
    "text": Template.text("{prompt}\n{query}\n"),
}


# What a GGUF file cannot say has llama.cpp's value here; its heads of gemma2 and olmo2 are always tied, or never.
IN_GGUF: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "smollm3": {"no_rope_layer_interval": 4},
    "gemma2": {"query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6},
    "ministral": {"sliding_window": 4096},
    "olmo2": {"tie_word_embeddings": False},
}


def tiny_folder(folder: Path, family: str = "llama", **options: Any) -> Path:
    """A tiny model's folder; a hidden size of 64 fits every block type."""
    write_folder(folder, family, **{"hidden_size": 64, "head_dim": 16, **options})
    return folder


def tuned(model: Path, template: Template | None = None, text: str = TEXT, seed: int = 0) -> SoftPrompt:
    """A prompt whose rows have moved away from their anchors."""
    prompt = SoftPrompt.from_text(Source.open(model), text, template=template)
    generator = torch.Generator().manual_seed(seed)
    return prompt.replace(embeddings=prompt.embeddings + 0.1 * torch.randn(prompt.anchor.shape, generator=generator))
