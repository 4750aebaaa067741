"""config.json and generation_config.json of a model copy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from embedgrad.exports.said import unsaid
from embedgrad.exports.source import Source
from embedgrad.exports.vocabulary import Vocabulary
from embedgrad.model.config import ModelConfig, is_composite, text_part
from embedgrad.model.families import ARCHITECTURES
from embedgrad.model.fields import read_object
from embedgrad.model.layer_kinds import window_fields
from embedgrad.model.rope import RopeConfig, inverse_frequencies
from embedgrad.util.errors import ExportError

# Rotary scalings of published Llama 3 models, in which GGUF files hold the divisors instead:
# (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings).
_LLAMA3 = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))


def write_configs(source: Source, words: Vocabulary, out: Path, untie: bool, dtype: torch.dtype) -> None:
    """Writes both files. Of a folder's own fields only those change that must."""
    if source.gguf is None:
        config = _of_text(read_object(source.path / "config.json"))
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


def _of_text(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json itself; of a multimodal model one that describes its text part as a model of its own."""
    if not is_composite(config):
        return config
    shared = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "transformers_version")
    text = dict(text_part(config))
    text.setdefault("model_type", ARCHITECTURES[text["architectures"][0]])
    return {name: config[name] for name in shared if name in config} | text


def hf_config(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json that describes a GGUF file. Raises ExportError where it cannot express something."""
    tokenizer = source.tokenizer
    eos: Any = list(tokenizer.eos_ids)
    return {
        **model_fields(source.config, str(source.path)),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def model_fields(c: ModelConfig, where: str) -> dict[str, Any]:
    """What a config.json says about a model, without its tokenizer.

    where: names the model in messages. Raises ExportError where config.json cannot express something.
    """
    kind = c.kind
    result: dict[str, Any] = {
        "architectures": [kind.architectures[0]],
        "model_type": c.family,
        "head_dim": c.head_dim,
        kind.gate_field: kind.gate_values[0],
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.rope.longest if c.rope.kind == "longrope" else c.max_position,
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "pad_token_id": None,  # some families' default lies outside of the vocabulary
        "rms_norm_eps": c.rms_eps,
        "rope_theta": c.rope.theta,
        "tie_word_embeddings": c.tied,
        "vocab_size": c.vocab_size,
    }
    if not kind.qkv_bias and c.qkv_bias != c.output_bias:
        raise ExportError(f"{where} has biases on some attention projections only: config.json has no such field.")
    biases = {"attention_bias": c.output_bias, "mlp_bias": c.mlp_bias}
    result |= {name: biases[name] for name in kind.switches} | _kind_fields(c)
    scaling = _scaling(c, where)
    result |= {} if scaling is None else {"rope_scaling": scaling}
    _check_said(c, where, result)
    return result


def _kind_fields(c: ModelConfig) -> dict[str, Any]:
    """The fields that only some families have."""
    kind, result = c.kind, dict[str, Any]()
    for own, name in kind.numbers.items():
        values = {"query_scalar": c.scale**-2, "query_scale": c.scale}
        value = values[own] if own in values else getattr(c, own)
        whole = own == "query_scalar" and math.isclose(value, round(value), rel_tol=1e-9)
        result[name] = round(value) if whole else value
    result |= window_fields(kind.windows, kind.defaults, c.windows)
    if kind.unrotated is not None:
        result["no_rope_layers"] = [int(layer not in c.unrotated) for layer in range(c.num_layers)]
    if c.local_rope is not None:
        result["rope_local_base_freq"] = c.local_rope.theta
    if c.rope.part != 1:
        result["partial_rotary_factor"] = c.rope.rotated(c.head_dim) / c.head_dim
    if "original_max_position_embeddings" in kind.defaults:
        long = c.rope.kind == "longrope"
        result["original_max_position_embeddings"] = c.rope.original_max_position if long else c.max_position
    return result


def _check_said(c: ModelConfig, where: str, fields: dict[str, Any]) -> None:
    """Raises ExportError unless config.json, read again, describes the model that is exported."""
    said = ModelConfig.from_hf(fields, "config.json")
    names = (
        "scale", "embedding_scale", "residual_scale", "logit_divisor", "attention_softcap", "logit_softcap", "windows",
        "unrotated", "max_position",
    )  # fmt: skip
    found = unsaid(c, said, names, 1e-9)
    if found is not None:
        raise ExportError(f"{where}: config.json cannot say that {found}.")


def _scaling(c: ModelConfig, where: str) -> dict[str, Any] | None:
    rope = c.rope
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
            if _same_frequencies(c, candidate):
                rope = candidate
                break
    if rope.kind == "longrope":
        if not rope.long_divisors:
            raise ExportError(f"{where} has no divisors for long texts, which config.json holds for LongRoPE.")
        return {
            "rope_type": "longrope", "short_factor": list(rope.divisors), "long_factor": list(rope.long_divisors),
            "attention_factor": rope.attention_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }  # fmt: skip
    if rope.kind != "llama3":
        raise ExportError(
            f"{where} holds rotary frequencies of its own, which config.json cannot express; export from the "
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
