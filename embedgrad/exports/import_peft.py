"""Makes a starting prompt of a PEFT prompt-tuning adapter.

An adapter has rows but no tokens. Where it was initialised from a text of as many tokens, these are the prompt's
tokens; else each row gets the vocabulary's token whose embedding has the largest cosine with it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from embedgrad.exports.source import Source
from embedgrad.prompt.prompt import SoftPrompt, default_template
from embedgrad.prompt.template import Template
from embedgrad.util.errors import ConfigError, EmbedGradError, PromptError

PLACES = ("front", "template")
_CONFIG, _WEIGHTS, _TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
_ROWS = 8192  # rows of the table whose cosines are computed at a time
# The prompt is the first message; the rest is rendered as it would be without it, which is where PEFT puts its rows.
_FRONT = "{{- messages[0]['content'] }}{%- set messages = messages[1:] %}{{- '' }}"


def import_prompt(
    adapter: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    place: str = "template",
    template: Template | None = None,
) -> SoftPrompt:
    """A prompt with the rows of a PEFT prompt-tuning adapter, to start an optimisation from.

    adapter: its folder. model: folder, .gguf file or hub id of its base model. place: "front" puts the rows before the
    whole conversation, as PEFT does, and so computes what PEFT computes for one query; "template" puts them where
    `template` says, by default in the system turn. Raises PromptError (no such adapter, or another model's),
    ModelError, ConfigError.
    """
    if place not in PLACES:
        raise ConfigError(f"there is no place {place!r}; choose one of {', '.join(PLACES)}.")
    folder = Path(adapter)
    config = _config(folder)
    rows = _rows(folder, config)
    source = Source.open(model)
    if rows.shape[1] != source.config.hidden_size:
        raise PromptError(
            f"the adapter {folder} has rows of {rows.shape[1]} numbers, and {source.name} has hidden size "
            f"{source.config.hidden_size}; give the adapter's base model."
        )
    if source.input_scale != 1:
        rows = rows / source.input_scale
    if template is None:
        template = _front(source) if place == "front" else default_template(source)
    ids = _initial_ids(source, config, len(rows)) or nearest(source.table, rows)
    prompt = SoftPrompt.from_ids(source, ids, template)
    about = {"adapter": folder.absolute().name, "base_model": config.get("base_model_name_or_path")}
    return prompt.replace(embeddings=rows, metadata={"imported": about})


def nearest(table: Tensor, rows: Tensor) -> list[int]:
    """For each of `rows` [n, d] the row of `table` [V, d] with the largest cosine; of equal ones the first."""
    wanted = torch.nn.functional.normalize(rows.float(), dim=1)
    best, ids = torch.full((len(rows),), -torch.inf), torch.zeros(len(rows), dtype=torch.int64)
    for start in range(0, len(table), _ROWS):
        piece = torch.nn.functional.normalize(table[start : start + _ROWS].float(), dim=1)
        cosine, at = (wanted @ piece.T).max(dim=1)
        better = cosine > best
        best, ids = torch.where(better, cosine, best), torch.where(better, at + start, ids)
    return [int(id) for id in ids]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PromptError(f"{folder} is no PEFT adapter: it has no {_CONFIG}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PromptError(f"{path} is not readable JSON; fetch the adapter again.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "PROMPT_TUNING":
        raise PromptError(
            f"{folder} is an adapter of type {kind!r}; only PROMPT_TUNING holds rows that a prompt can start from."
        )
    if config.get("num_transformer_submodules") not in (None, 1):
        raise PromptError(f"{folder} is an adapter for several submodules; a decoder-only model has one.")
    return dict(config)


def _rows(folder: Path, config: dict[str, Any]) -> Tensor:
    """The virtual tokens' embeddings, [n, d] float32."""
    path = folder / _WEIGHTS
    if not path.is_file():
        hint = "; pickled adapter_model.bin is not read, save it as safetensors" if any(folder.glob("*.bin")) else ""
        raise PromptError(f"{folder} has no {_WEIGHTS}{hint}.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = [name for name in file.keys() if name.endswith(_TENSOR)]  # noqa: SIM118 (no mapping)
            rows: Tensor | None = file.get_tensor(names[0]) if len(names) == 1 else None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise PromptError(f"{path} is not a complete safetensors file; fetch it again.") from error
    if rows is None or rows.dim() != 2 or 0 in rows.shape or not rows.is_floating_point():
        raise PromptError(f"{path} should hold one matrix {_TENSOR!r} of numbers, [virtual tokens, hidden size].")
    rows = rows.float().clone()
    if not bool(rows.isfinite().all()):
        raise PromptError(f"{path} holds numbers that are not finite.")
    count = config.get("num_virtual_tokens")
    if count is not None and count != len(rows):
        raise PromptError(f"{path} has {len(rows)} rows, and its {_CONFIG} says {count}; fetch the adapter again.")
    return rows


def _initial_ids(source: Source, config: dict[str, Any], count: int) -> list[int] | None:
    """The tokens of the text that the adapter was initialised from, if there are `count`; else None."""
    text = config.get("prompt_tuning_init_text")
    if config.get("prompt_tuning_init") != "TEXT" or not isinstance(text, str):
        return None
    try:
        ids = source.tokenizer.encode(text)
    except EmbedGradError:
        return None
    return ids if len(ids) == count and max(ids) < source.config.vocab_size else None


def _front(source: Source) -> Template:
    """The template that puts the prompt before the whole conversation."""
    own = source.tokenizer.chat_template
    if own is None:
        return Template.text("{prompt}{query}", end=False)
    messages = [{"role": "system", "content": "{prompt}"}, {"role": "user", "content": "{query}"}]
    return Template.chat(messages, chat_template=_FRONT + own)
