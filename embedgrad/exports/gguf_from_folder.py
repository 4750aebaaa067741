"""A model folder as the parts of a GGUF file: metadata, tokenizer, and tensors in their stored types."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

from embedgrad.exports.gguf_file import Typed, plain_kind
from embedgrad.exports.said import unsaid
from embedgrad.exports.source import Source
from embedgrad.model.config import ModelConfig
from embedgrad.model.families import Family
from embedgrad.model.fields import read_object
from embedgrad.model.files.gguf import LONGROPE_DIVISORS, NAMES, ROPE_DIVISORS, StoredTensor
from embedgrad.model.files.gguf_tokenizer import SPLITS
from embedgrad.model.rope import RopeConfig, inverse_frequencies, yarn_attention
from embedgrad.util.errors import ExportError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_WITH_BIASES = ("llama",)  # architectures of which llama.cpp reads every bias
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # general.file_type


def folder_as_gguf(source: Source) -> tuple[dict[str, Any], dict[str, bytes], list[StoredTensor]]:
    """(metadata, the same encoded, tensors). Raises ExportError for what llama.cpp's architectures cannot express."""
    config = source.config
    kind = config.kind
    if kind.gguf is None:
        raise ExportError(f"{source.name} is of the family {kind.title}, for which llama.cpp has no architecture.")
    architecture = kind.gguf
    if kind.gguf_tied is not None and kind.gguf_tied != config.tied:
        head = "shares the embedding table" if config.tied else "is a matrix of its own"
        raise ExportError(
            f"{source.name} has a head that {head}, which llama.cpp's {kind.gguf} has no place for; use another target."
        )
    _check(source)
    tensors = [_tensor(source, name) for name in config.shapes()]
    if config.rope.kind == "longrope":
        both = zip(LONGROPE_DIVISORS, (config.rope.divisors, config.rope.long_divisors), strict=True)
        tensors += [_stored(name, torch.tensor(values, dtype=torch.float32)) for name, values in both]
    if config.rope.kind in ("llama3", "divisors"):
        plain, scaled = (
            inverse_frequencies(rope, config.head_dim, torch.float64)
            for rope in (RopeConfig(config.rope.theta), config.rope)
        )
        divisors = plain / scaled
        tensors.append(_stored(ROPE_DIVISORS, divisors.float()))
    table = json.loads((source.path / "tokenizer.json").read_text(encoding="utf-8"))
    fields = {
        "general.architecture": Typed("str", architecture),
        "general.type": Typed("str", "model"),
        "general.name": Typed("str", source.name),
        "general.file_type": Typed("u32", _FILE_TYPES[tensors[0].kind]),
        "general.quantization_version": Typed("u32", 2),
        **{f"{architecture}.{name}": value for name, value in _sizes(config).items()},
        **_tokenizer(source, table),
    }
    _check_said(source, fields)
    metadata = {
        key: np.array(value.value) if value.kind in ("[i32]", "[f32]") else value.value for key, value in fields.items()
    }
    return metadata, {key: value.encoded() for key, value in fields.items()}, tensors


def _check(source: Source) -> None:
    config = source.config
    hidden_keys = any(_seen(config, config.max_position).windows)
    if hidden_keys and config.kind.gguf_every is None:
        raise ExportError(
            f"{source.name} attends to a sliding window, which a GGUF file of its architecture cannot say; shorten the "
            f"context in config.json to the window, or use another target."
        )
    rope = config.rope
    if rope.kind == "longrope" and not rope.long_divisors:
        raise ExportError(f"{source.name} has no long_factor, which GGUF files of its architecture hold.")
    usual = RopeConfig(
        rope.theta, "yarn", rope.factor, original_max_position=rope.original_max_position,
        attention_factor=yarn_attention(rope.factor),
    )  # fmt: skip
    if rope.kind == "yarn" and rope != usual:
        raise ExportError(f"{source.name} has settings of yarn that a GGUF file cannot say; use another target.")
    biases = (config.qkv_bias and not config.kind.qkv_bias) or config.mlp_bias or config.output_bias
    if biases and config.kind.gguf not in _WITH_BIASES:
        raise ExportError(f"{source.name} has biases for which llama.cpp's {config.kind.gguf} has no place.")


def _check_said(source: Source, fields: dict[str, Typed]) -> None:
    """Raises ExportError unless the metadata, read again, describe the model that is exported."""
    config = source.config
    shapes = dict(source.checkpoint.tensors.shapes())
    if config.tied:
        shapes.pop("lm_head.weight", None)
    metadata = {key: value.value for key, value in fields.items() if not key.startswith("tokenizer.")}
    divisors = (config.rope.divisors, config.rope.long_divisors) if _is_long(config) else ((), ())
    said = ModelConfig.from_gguf(metadata, source.name, shapes, divisors)
    names = (
        "scale", "embedding_scale", "residual_scale", "logit_divisor", "attention_softcap", "logit_softcap", "windows",
        "unrotated", "num_kv_heads", "head_dim", "qk_norm",
    )  # fmt: skip
    found = unsaid(_seen(config, config.max_position), _seen(said, config.max_position), names, 1e-6)
    if found is not None:
        raise ExportError(
            f"{source.name}: a GGUF file of the architecture {config.kind.gguf} cannot say that {found}; use another "
            f"target."
        )


def _seen(config: ModelConfig, context: int) -> ModelConfig:
    """The same with the windows that hide something: one as wide as the context is none."""
    windows = tuple(w if w is not None and w < context else None for w in config.windows)
    return replace(config, windows=windows)


def _is_long(config: ModelConfig) -> bool:
    return config.rope.kind == "longrope"


def _sizes(config: ModelConfig) -> dict[str, Typed]:
    fields = {
        "block_count": Typed("u32", config.num_layers),
        "context_length": Typed("u32", config.rope.longest if _is_long(config) else config.max_position),
        "embedding_length": Typed("u32", config.hidden_size),
        "feed_forward_length": Typed("u32", config.intermediate_size),
        "attention.head_count": Typed("u32", config.num_heads),
        "attention.head_count_kv": Typed("u32", config.num_kv_heads),
        "attention.key_length": Typed("u32", config.head_dim),
        "attention.value_length": Typed("u32", config.head_dim),
        "attention.layer_norm_rms_epsilon": Typed("f32", config.rms_eps),
        "rope.freq_base": Typed("f32", config.rope.theta),
        "rope.dimension_count": Typed("u32", config.rope.rotated(config.head_dim)),
    }
    for own, name in config.kind.gguf_numbers.items():
        value = config.scale if own == "query_scale" else getattr(config, own)
        if value is not None:
            fields[name] = Typed("f32", float(value))
    window = next((w for w in config.windows if w is not None), None)
    if window is not None and config.kind.gguf_every is not None:
        fields["attention.sliding_window"] = Typed("u32", window)
    if config.local_rope is not None:
        fields["rope.freq_base_swa"] = Typed("f32", config.local_rope.theta)
    if _is_long(config):
        fields["rope.scaling.attn_factor"] = Typed("f32", config.rope.attention_factor)
        fields["rope.scaling.original_context_length"] = Typed("u32", config.rope.original_max_position)
    if config.rope.kind in ("linear", "yarn"):
        fields["rope.scaling.type"] = Typed("str", config.rope.kind)
        fields["rope.scaling.factor"] = Typed("f32", config.rope.factor)
    if config.rope.kind == "yarn":
        fields["rope.scaling.original_context_length"] = Typed("u32", config.rope.original_max_position)
    return fields


def _tensor(source: Source, name: str) -> StoredTensor:
    kind, values = source.config.kind, source.checkpoint.tensors.get(name)
    part = name.rpartition(".")[0]
    heads = {"q_proj": source.config.num_heads, "k_proj": source.config.num_kv_heads}.get(part.rpartition(".")[2])
    if kind.gguf_permuted and heads is not None:  # the inverse of what GgufFile undoes
        half = len(values) // heads // 2
        values = values.reshape(heads, 2, half, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
    if source.config.norm_offset and part.endswith("norm"):
        values = values.float() + source.config.norm_offset
    return _stored(gguf_name(name, kind), values.float() if values.dim() == 1 else values)


def _stored(name: str, values: Tensor) -> StoredTensor:
    kind = plain_kind(values.dtype)
    values = values.float() if kind == "F32" else values
    return StoredTensor(name, kind, tuple(values.shape), values.contiguous().view(torch.uint8).reshape(-1))


def gguf_name(name: str, kind: Family) -> str:
    """A tensor's name in GGUF files."""
    stem, _, suffix = name.rpartition(".")
    top = {hf: own for own, hf in NAMES.items()}
    if stem in top:
        return f"{top[stem]}.{suffix}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{ {hf: own for own, hf in kind.gguf_names.items()}[part] }.{suffix}"


def _tokenizer(source: Source, table: dict[str, Any]) -> dict[str, Typed]:
    model, tokenizer = table["model"], source.tokenizer
    if model.get("type", "BPE") != "BPE":
        raise ExportError(f"{source.name} has a tokenizer of type {model.get('type')!r}; GGUF is written for BPE only.")
    config_path = source.path / "tokenizer_config.json"
    declared = read_object(config_path).get("added_tokens_decoder") if config_path.is_file() else None
    added = {int(key): entry for key, entry in (declared if isinstance(declared, dict) else {}).items()}
    added |= {entry["id"]: entry for entry in table.get("added_tokens") or ()}
    by_id = {id: text for text, id in model["vocab"].items()} | {id: entry["content"] for id, entry in added.items()}
    tokens = [by_id.get(id, f"[PAD{id}]") for id in range(source.config.vocab_size)]
    types = [_type(id, text, by_id, added, model) for id, text in enumerate(tokens)]
    fields = {"tokenizer.ggml.tokens": Typed("[str]", tokens), "tokenizer.ggml.token_type": Typed("[i32]", types)}
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    if model.get("byte_fallback"):
        fields |= _sentencepiece(source, table, tokens, types, pairs)
    else:
        fields |= {
            "tokenizer.ggml.model": Typed("str", "gpt2"),
            "tokenizer.ggml.pre": Typed("str", _pre_tokenizer(source, table)),
            "tokenizer.ggml.merges": Typed("[str]", [" ".join(pair) for pair in pairs]),
        }
    fields["tokenizer.ggml.add_bos_token"] = Typed("bool", tokenizer.adds_bos)
    ids = {text: id for id, text in enumerate(tokens)}
    roles = (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"), ("unknown", "unk_token"))
    for name, role in roles:
        if tokenizer.special.get(role) in ids:
            fields[f"tokenizer.ggml.{name}_token_id"] = Typed("u32", ids[tokenizer.special[role]])
    if tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = Typed("str", tokenizer.chat_template)
    return fields


def _type(id: int, text: str, by_id: dict[int, str], added: dict[int, Any], model: dict[str, Any]) -> int:
    if id not in by_id:
        return _UNUSED
    if text == model.get("unk_token") and model.get("byte_fallback"):
        return _UNKNOWN
    if id in added:
        return _CONTROL if added[id].get("special") else _USER_DEFINED
    return _BYTE if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") else _NORMAL


def _sentencepiece(
    source: Source, table: dict[str, Any], tokens: list[str], types: list[int], pairs: list[list[str]]
) -> dict[str, Typed]:
    """The scores of SentencePiece: the earlier a merge, the higher."""
    steps = (table.get("normalizer") or {}).get("normalizers") or [table.get("normalizer") or {}]
    metaspace = table.get("pre_tokenizer") or {}
    if any(step.get("type") not in (None, "Prepend", "Replace") for step in steps) or metaspace.get("type") not in (
        None,
        "Metaspace",
    ):
        raise ExportError(f"{source.name} has a SentencePiece tokenizer with steps that a GGUF file cannot express.")
    prefix = any(step.get("type") == "Prepend" for step in steps)
    prefix = prefix or metaspace.get("prepend_scheme", "never") in ("always", "first")
    rank: dict[str, float] = {}
    for index, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, -float(index))
    lowest = -float(len(pairs))
    scores = [rank.get(text, lowest) if kind == _NORMAL else 0.0 for text, kind in zip(tokens, types, strict=True)]
    return {
        "tokenizer.ggml.model": Typed("str", "llama"),
        "tokenizer.ggml.scores": Typed("[f32]", scores),
        "tokenizer.ggml.add_space_prefix": Typed("bool", prefix),
    }


def _pre_tokenizer(source: Source, table: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which the tokenizer splits a text before it merges."""
    wanted = _steps(table.get("pre_tokenizer"))
    for name, make in SPLITS.items():
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(make())
        if _steps(json.loads(backend.to_str())["pre_tokenizer"]) == wanted:
            return name
    raise ExportError(
        f"{source.name} splits texts in a way for which embedgrad knows no name of llama.cpp; export it as hf, and "
        f"convert that folder with llama.cpp's convert_hf_to_gguf.py."
    )


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    """The fields that decide where a text is split."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [step for each in pre_tokenizer["pretokenizers"] for step in _steps(each)]
    names = ("type", "pattern", "behavior", "invert", "individual_digits", "add_prefix_space", "use_regex")
    values = [json.dumps(pre_tokenizer.get(name), sort_keys=True) for name in names]
    return [tuple(values)]
