"""Tiny random checkpoints of every family, written to disk as transformers and the gguf package write them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from gguf.quants import dequantize, quantize
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.model.blocks import HALVES_AT

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "ministral": (transformers.MinistralConfig, transformers.MinistralForCausalLM),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
    "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}
STYLES = ("smollm", "qwen2", "llama3", "mistral")
STYLE_OF = {
    "llama": "smollm", "mistral": "mistral", "ministral": "mistral", "qwen2": "qwen2", "qwen3": "qwen2",
    "olmo2": "llama3", "smollm3": "llama3", "phi3": "mistral", "granite": "smollm",
    "gemma2": "mistral", "gemma3_text": "mistral",
}  # fmt: skip
SMALL = {
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
VOCABULARY = 400
# What a tiny model of a family needs beyond SMALL: sizes that transformers would not take from the others, token ids
# that lie in the vocabulary, and numbers that are not those of Llama.
EXTRA: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "olmo2": {"eos_token_id": 2},
    "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "phi3": {"pad_token_id": 0, "eos_token_id": 2},
    "granite": {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0,
    },
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 9, "sliding_window": 6, "attn_logit_softcapping": 5.0,
               "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 9, "sliding_window": 6, "sliding_window_pattern": 2},
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PASSAGES = """Classify the sentiment of the movie review. Answer with one word, positive or negative.
The movie was a delight from the first minute to the last; I laughed, I cried, and I would see it again in 2024.
It's 1234567 times better than what we've seen: don't miss it!  The plot isn't new, but they'll surprise you.
Solve 3x + 17 = 80 step by step. First, subtract 17 from both sides: 3x = 63. Then divide by 3, so x = 21.
def f(x):\n    return x ** 2  # squared\n\n\nÜber den Wolken, naïve café, 你好，世界。 Привет, мир! 🙂 e\u0301
""".splitlines(keepends=True)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_SPECIAL = {
    "smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen2": [],
    "llama3": [],
    "mistral": ["<unk>", "<s>", "</s>"],
}
# Added after training, as those families do.
_ADDED = {
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
}
_ROLES = {
    "smollm": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
    "qwen2": {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}


@functools.cache
def tokenizer_json(style: str) -> str:
    """tokenizer.json of a small BPE in the style of SmolLM2, Qwen2, Llama-3, or Mistral / Llama-2 (byte fallback)."""
    if style == "mistral":
        return _metaspace_json()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style == "smollm")
    if style == "smollm":
        split: Any = pre_tokenizers.Digits(individual_digits=True)
    else:
        split = pre_tokenizers.Split(Regex(_QWEN2 if style == "qwen2" else _LLAMA3), behavior="isolated", invert=False)
    if style == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        PASSAGES * 3,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(_ADDED.get(style, ())),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=_SPECIAL[style],
        ),
    )
    tokenizer.add_special_tokens(_ADDED.get(style, []))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if style == "llama3":
        bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
        template = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template])
        table = json.loads(tokenizer.to_str())
        table["model"]["ignore_merges"] = True
        return json.dumps(table)
    return str(tokenizer.to_str())


def _metaspace_json() -> str:
    """Llama-2 style: pieces with ▁, byte fallback, a prefix space; merges found with ▁ as an ordinary character."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    alphabet = sorted({"▁", *"".join(PASSAGES)} - set(" \n你好世界🙂П"))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 259, show_progress=False, initial_alphabet=alphabet, limit_alphabet=len(alphabet)
    )
    trained.train_from_iterator(PASSAGES * 3, trainer)
    table = json.loads(trained.to_str())["model"]
    learned = sorted(table["vocab"], key=table["vocab"].get)
    pieces = [*_SPECIAL["mistral"], *(f"<0x{byte:02X}>" for byte in range(256))]
    # Pieces made by merges come before single characters, as in Llama-2's vocabulary.
    pieces += [piece for piece in learned if len(piece) > 1] + [piece for piece in learned if len(piece) == 1]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in table["merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in _SPECIAL["mistral"]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return str(tokenizer.to_str())


def write_tokenizer(folder: Path, style: str = "smollm", *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(style), encoding="utf-8")
    config = {**_ROLES[style], "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def random_model(family: str = "llama", *, seed: int = 0, scale: float = 0.2, **config: Any) -> Any:
    """A transformers model with random weights (norm weights near 1, biases too), float32, in evaluation mode."""
    config_class, model_class = FAMILIES[family]
    sizes = {**SMALL, **EXTRA.get(family, {}), **config}
    model = model_class(config_class(**sizes)).eval()
    centre = 0.0 if family.startswith("gemma") else 1.0
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + centre if "norm" in name else noise)
    return model


def write_folder(
    folder: Path,
    family: str = "llama",
    *,
    style: str | None = None,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
    seed: int = 0,
    scale: float = 0.2,
    **config: Any,
) -> Any:
    """Write a whole model folder; returns the transformers model (in `dtype`). `shard_bytes` makes several files."""
    model = random_model(family, seed=seed, scale=scale, **config).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=shard_bytes or "5GB")
    write_tokenizer(folder, style or STYLE_OF[family])
    return model


GGUF_OF = {"mistral": "llama", "ministral": "llama", "gemma3_text": "gemma3"}
"""The architecture in GGUF files, where it has another name."""


def gguf_names(architecture: str, layers: int) -> Any:
    """The gguf package's own mapping of Hugging Face names."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, layers)


def gguf_extras(model: Any) -> dict[str, Any]:
    """The fields that llama.cpp's converter writes for some architectures beside the usual ones."""
    c, kind = model.config, model.config.model_type
    extras: dict[str, Any] = {}
    if kind.startswith("gemma"):
        extras["attention.sliding_window"] = c.sliding_window
    if kind == "gemma2":
        extras["attn_logit_softcapping"] = float(c.attn_logit_softcapping)
        extras["final_logit_softcapping"] = float(c.final_logit_softcapping)
    if kind == "granite":
        extras = {
            "embedding_scale": float(c.embedding_multiplier), "residual_scale": float(c.residual_multiplier),
            "attention.scale": float(c.attention_multiplier), "logit_scale": float(c.logits_scaling),
        }  # fmt: skip
    if kind == "phi3" and c.rope_parameters["rope_type"] == "longrope":
        extras["rope.scaling.original_context_length"] = c.original_max_position_embeddings
        extras["rope.scaling.attn_factor"] = float(model.model.rotary_emb.attention_scaling)
    return extras


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of llama-type GGUF files: halves of a head interleaved."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


def write_gguf(
    path: Path,
    model: Any,
    *,
    style: str | None = None,
    kind: str = "F32",
    rope_divisors: np.ndarray | None = None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write a transformers model as a GGUF file: matrices as block type `kind`, vectors as F32.

    `metadata`: further unsigned integers, floats, strings or booleans; None leaves a field out.
    """
    config, family = model.config, model.config.model_type
    architecture = GGUF_OF.get(family, family)
    names = gguf_names(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    fields: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
    } | gguf_extras(model)
    fields = {f"{architecture}.{name}": value for name, value in fields.items()}
    fields |= tokenizer_metadata(style or STYLE_OF[family]) | (metadata or {})
    for name, value in fields.items():
        _add_field(writer, name, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if family.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if architecture in ("llama", "granite", "smollm3") and (".q_proj" in name or ".k_proj" in name):
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            values = permuted(values, heads)
        stored = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        own = names.get_name(name, try_suffixes=(".weight", ".bias")) or "output.weight"
        writer.add_tensor(own, _blocks(values, stored), raw_dtype=stored)
    if rope.get("rope_type") == "longrope":
        for kind_, name in (("short", "rope_factors_short.weight"), ("long", "rope_factors_long.weight")):
            writer.add_tensor(name, np.array(rope[f"{kind_}_factor"], np.float32))
    if rope_divisors is not None:
        writer.add_tensor("rope_freqs.weight", rope_divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _blocks(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """`values` in blocks; for the types that the gguf package cannot write, random blocks of about their size."""
    if kind.name not in HALVES_AT or kind.name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        return quantize(values, kind)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(values.size)
    blocks = draw.integers(0, 256, (values.size // elements, size), dtype=np.uint8)
    scale = np.float16(1)
    for _ in range(2):  # first to see how large the numbers become
        for at in HALVES_AT[kind.name]:
            blocks[:, at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
        scale = np.float16(values.std() / dequantize(blocks, kind).std())
    return blocks.reshape(values.shape[0], -1)


def tokenizer_metadata(style: str) -> dict[str, Any]:
    """The tokenizer of `style` as GGUF metadata."""
    table = json.loads(tokenizer_json(style))
    model, added = table["model"], {entry["content"]: entry["id"] for entry in table["added_tokens"]}
    ids = {**model["vocab"], **added}
    tokens = sorted(ids, key=lambda text: ids[text])
    types = [3 if text in added else 1 for text in tokens]
    result: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.chat_template": CHAT_TEMPLATE}
    if style == "mistral":
        types = [6 if text.startswith("<0x") else type for text, type in zip(tokens, types, strict=True)]
        types[0] = 2
        rank = {"".join(merge): -float(index) for index, merge in reversed(list(enumerate(model["merges"])))}
        lowest = -float(len(rank))
        scores = [0.0 if type != 1 else rank.get(text, lowest) for text, type in zip(tokens, types, strict=True)]
        result |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}
    else:
        pre = {"smollm": "smollm", "qwen2": "qwen2", "llama3": "llama-bpe"}[style]
        merges = [" ".join(merge) for merge in model["merges"]]
        result |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
        result["tokenizer.ggml.add_bos_token"] = style == "llama3"
    result["tokenizer.ggml.token_type"] = types
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        text = _ROLES[style].get(role)
        if text is not None:
            result[f"tokenizer.ggml.{key}_token_id"] = ids[text]
    return result


def _add_field(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
