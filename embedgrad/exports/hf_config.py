"""config.json and generation_config.json of a model copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from embedgrad.exports.source import Source
from embedgrad.exports.vocabulary import Vocabulary
from embedgrad.model.config import ARCHITECTURES, ModelConfig
from embedgrad.model.fields import read_object
from embedgrad.model.rope import RopeConfig, inverse_frequencies
from embedgrad.util.errors import ExportError

# Rotary scalings of published Llama 3 models, in which GGUF files hold the divisors instead:
# (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings).
_LLAMA3 = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))


def write_configs(source: Source, words: Vocabulary, out: Path, untie: bool, dtype: torch.dtype) -> None:
    """Writes both files. Of a folder's own fields only those change that must."""
    if source.gguf is None:
        config = read_object(source.path / "config.json")
        own = source.path / "generation_config.json"
        generation = read_object(own) if own.is_file() else _stop_tokens(config)
    else:
        config = hf_config(source, dtype)
        generation = _stop_tokens(config)
    if words.rows != source.config.vocab_size:
        config["vocab_size"] = words.rows
    if untie and source.tied:
        config["tie_word_embeddings"] = False
    before = generation.get("suppress_tokens") or []
    generation["suppress_tokens"] = sorted({*before, *words.ids})
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def hf_config(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json that describes a GGUF file. Raises ExportError for a rotary scaling that it cannot express."""
    c, tokenizer = source.config, source.tokenizer
    architecture = next(name for name, family in ARCHITECTURES.items() if family == c.family)
    eos: Any = list(tokenizer.eos_ids)
    result: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": c.family,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position,
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "rms_norm_eps": c.rms_eps,
        "rope_theta": c.rope.theta,
        "tie_word_embeddings": c.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": c.vocab_size,
    }
    if c.family != "qwen2" and c.qkv_bias != c.output_bias:
        raise ExportError(
            f"{source.path} has biases on some attention projections only: config.json has no such field."
        )
    if c.family in ("llama", "qwen3"):
        result["attention_bias"] = c.qkv_bias
    if c.family == "llama":
        result["mlp_bias"] = c.mlp_bias
    scaling = _scaling(source, c.rope)
    return result | ({} if scaling is None else {"rope_scaling": scaling})


def _scaling(source: Source, rope: RopeConfig) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    if rope.kind == "linear":
        return {"rope_type": "linear", "factor": rope.factor}
    if rope.kind == "yarn":
        names = ("factor", "attention_factor", "beta_fast", "beta_slow", "truncate")
        found = {name: getattr(rope, name) for name in names}
        return {"rope_type": "yarn", **found, "original_max_position_embeddings": rope.original_max_position}
    if rope.kind == "divisors":
        for factor, low, high, original in _LLAMA3:
            candidate = RopeConfig(rope.theta, "llama3", factor, low, high, original)
            if _same_frequencies(source.config, candidate):
                rope = candidate
                break
    if rope.kind != "llama3":
        raise ExportError(
            f"{source.path} holds rotary frequencies of its own, which config.json cannot express; export from the "
            f"model's folder instead."
        )
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position,
    }


def _same_frequencies(config: ModelConfig, rope: RopeConfig) -> bool:
    wanted, found = (inverse_frequencies(r, config.head_dim) for r in (config.rope, rope))
    return bool(torch.allclose(wanted, found, rtol=1e-5, atol=0))


def _stop_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that transformers would take from config.json if there were no generation_config.json."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}
