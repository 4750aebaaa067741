"""A model's configuration, read from config.json or GGUF metadata.

No field that could change the result is ignored: an unknown field raises a ModelError with its name and value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedgrad.model.fields import Fields
from embedgrad.model.rope import RopeConfig, gguf_rope, hf_rope
from embedgrad.util.errors import ModelError
from embedgrad.util.shown import short

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")

# Defaults of transformers' config classes for fields that config.json does not have.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
}
_DEFAULT_WINDOW = 4096
# Mistral-7B v0.1: hidden size, width of the MLP, layers, base of the rotations, context; 32,000 words and a few added.
_MISTRAL_7B, _MISTRAL_WORDS = (4096, 14336, 32, 10000.0, 32768), 33000
_DEFAULT_MAX_WINDOW_LAYERS = 28
_MOST_LAYERS = 4096


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields that do not change what the frozen model computes: bookkeeping, initialisation, training, generation settings
# (`Sampling` replaces them), token ids that the tokenizer reads, and choices between equivalent implementations.
_HARMLESS = _words(
    """
    architectures model_type transformers_version dtype torch_dtype _name_or_path name_or_path _commit_hash
    transformers.js_config unsloth_version unsloth_fixed is_llama_config tokenizer_class task_specific_params
    finetuning_task id2label label2id num_labels problem_type prefix keys_to_ignore_at_inference license
    initializer_range attention_dropout tie_last_hidden_states pretraining_tp use_cache cache_implementation
    attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset
    _experts_implementation _experts_implementation_internal use_bfloat16 torchscript tf_legacy_loss
    output_hidden_states output_attentions output_scores output_logits return_dict use_return_dict
    return_dict_in_generate chunk_size_feed_forward tie_encoder_decoder
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping max_time num_beams num_beam_groups
    temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff diversity_penalty repetition_penalty
    encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty renormalize_logits penalty_alpha stop_strings
    auto_map max_sequence_length model_max_length max_seq_len max_seq_length seq_length tokenizer_model_max_length
    padding_side tokenizer_padding_side truncation_side pad_to_multiple_of gradient_checkpointing
    use_flash_attn use_flash_attention use_flash_attention_2 _flash_attn_2_enabled use_sdpa use_fused_rms_norm
    summary_type summary_use_proj summary_activation summary_proj_to_labels
    """
)
_DROPOUT = re.compile(r"(.+_)?(dropout|pdrop|layerdrop|droppath|drop_path_rate)(_prob|_rate)?")  # acts in training only
_GGUF_HARMLESS = _words(
    """
    context_length block_count embedding_length feed_forward_length attention.head_count attention.head_count_kv
    attention.layer_norm_rms_epsilon attention.key_length attention.value_length rope.freq_base rope.dimension_count
    rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scaling.finetuned
    rope.scale_linear vocab_size tensor_data_layout pooling_type
    """
)
# GGUF fields that are accepted with this one value, with which they change nothing.
_GGUF_NEUTRAL: dict[str, object] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "use_parallel_residual": False,
    "logit_scale": 1.0,
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder.

    intermediate_size: width of the MLP. tied: the head is the embedding table. qkv_bias, output_bias, mlp_bias: whether
    these projections have a bias. qk_norm: queries and keys are normalised per head (Qwen3). windows[l]: sliding window
    of layer l, in tokens: a token at position p sees the keys whose position is above p - window; None: all keys.
    max_position: context length in tokens.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_eps: float
    rope: RopeConfig
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    max_position: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str) -> ModelConfig:
        """Reads the contents of a config.json. `where` names the file in messages. Raises ModelError."""
        fields = Fields(config, where)
        _refuse_quantised(config, where)
        family = _hf_family(config, where)
        defaults = _HF_DEFAULTS[family]
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        layers = fields.integer("num_hidden_layers", most=_MOST_LAYERS)
        kv_heads = fields.integer("num_key_value_heads", defaults["num_key_value_heads"], none=heads)
        activation = fields.take("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ModelError(f'{where}: "hidden_act" is {short(activation)}; supported is "silu".')
        has_bias_switch = family in ("llama", "qwen3")
        attention_bias = fields.boolean("attention_bias", False) if has_bias_switch else False
        max_position = fields.integer("max_position_embeddings", defaults["max_position_embeddings"])
        rope = hf_rope(fields, max_position)
        result = cls(
            family=family,
            num_layers=layers,
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=fields.integer("head_dim", defaults["head_dim"], none=hidden // heads),
            vocab_size=fields.integer("vocab_size"),
            rms_eps=fields.number("rms_norm_eps", 1e-6),
            rope=rope,
            tied=fields.boolean("tie_word_embeddings", False),
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias,
            mlp_bias=fields.boolean("mlp_bias", False) if family == "llama" else False,
            qk_norm=family == "qwen3",
            windows=_hf_windows(fields, family, layers),
            max_position=rope.context(max_position),
        )
        fields.expect("pruned_heads", {})
        dropouts = {name for name in config if isinstance(name, str) and _DROPOUT.fullmatch(name)}
        fields.refuse_the_rest(_HARMLESS | dropouts)
        return result._checked(where)

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        where: str,
        shapes: Mapping[str, tuple[int, ...]],
        rope_divisors: tuple[float, ...] = (),
    ) -> ModelConfig:
        """Reads GGUF metadata. Raises ModelError.

        shapes: shape of each tensor by its Hugging Face name; the names tell whether the head is tied and which biases
        there are. rope_divisors: contents of `rope_freqs.weight`, empty where the file has none.
        """
        family = metadata.get("general.architecture")
        if family not in GGUF_ARCHITECTURES:
            raise ModelError(
                f"{where}: architecture {short(family)} is not supported; supported are "
                f"{', '.join(GGUF_ARCHITECTURES)}."
            )
        prefix = f"{family}."
        fields = Fields({k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}, where, prefix)
        hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count", same=True)
        layers = fields.integer("block_count", most=_MOST_LAYERS)
        head_dim = fields.integer("attention.key_length", None, none=hidden // heads)
        for name in ("attention.value_length", "rope.dimension_count"):
            if fields.integer(name, head_dim) != head_dim:
                raise ModelError(f"{where}: {prefix}{name} is {fields.take(name)}; supported is {head_dim} only.")
        embedding = shapes.get("model.embed_tokens.weight", ())
        max_position = fields.integer("context_length")
        rope = gguf_rope(fields, rope_divisors, max_position)
        for name, value in _GGUF_NEUTRAL.items():
            fields.expect(name, value)
        result = cls(
            family=str(family),
            num_layers=layers,
            hidden_size=hidden,
            intermediate_size=fields.integer("feed_forward_length", same=True),
            num_heads=heads,
            num_kv_heads=fields.integer("attention.head_count_kv", heads, same=True),
            head_dim=head_dim,
            vocab_size=embedding[0] if embedding else fields.integer("vocab_size"),
            rms_eps=fields.number("attention.layer_norm_rms_epsilon"),
            rope=rope,
            tied="lm_head.weight" not in shapes,
            qkv_bias="model.layers.0.self_attn.q_proj.bias" in shapes,
            output_bias="model.layers.0.self_attn.o_proj.bias" in shapes,
            mlp_bias="model.layers.0.mlp.up_proj.bias" in shapes,
            qk_norm=family == "qwen3",
            windows=(_gguf_window(fields, str(family), hidden, embedding, rope, max_position),) * layers,
            max_position=rope.context(max_position),
        )
        fields.refuse_the_rest(_GGUF_HARMLESS)
        return result._checked(where)

    def _checked(self, where: str) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{where}: {self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly."
            )
        if self.head_dim % 2:
            raise ModelError(f"{where}: the head size {self.head_dim} is odd, and rotary embedding needs an even one.")
        if self.rope.divisors and len(self.rope.divisors) != self.head_dim // 2:
            raise ModelError(
                f"{where}: rope_freqs.weight has {len(self.rope.divisors)} values; it should have {self.head_dim // 2}."
            )
        return self

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in a checkpoint of this configuration, by its Hugging Face name."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        linear = [
            ("self_attn.q_proj", q, hidden, self.qkv_bias),
            ("self_attn.k_proj", kv, hidden, self.qkv_bias),
            ("self_attn.v_proj", kv, hidden, self.qkv_bias),
            ("self_attn.o_proj", hidden, q, self.output_bias),
            ("mlp.gate_proj", ffn, hidden, self.mlp_bias),
            ("mlp.up_proj", ffn, hidden, self.mlp_bias),
            ("mlp.down_proj", hidden, ffn, self.mlp_bias),
        ]
        norms = [("input_layernorm", hidden), ("post_attention_layernorm", hidden)]
        if self.qk_norm:
            norms += [("self_attn.q_norm", self.head_dim), ("self_attn.k_norm", self.head_dim)]
        result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name, rows, columns, bias in linear:
                result[f"{prefix}{name}.weight"] = (rows, columns)
                if bias:
                    result[f"{prefix}{name}.bias"] = (rows,)
            for name, size in norms:
                result[f"{prefix}{name}.weight"] = (size,)
        result["model.norm.weight"] = (hidden,)
        if not self.tied:
            result["lm_head.weight"] = (self.vocab_size, hidden)
        return result


def _refuse_quantised(config: Mapping[str, Any], where: str) -> None:
    for key in ("quantization_config", "compression_config", "quantization"):
        settings = config.get(key)
        if settings in (None, False, {}):
            continue
        method = settings.get("quant_method", settings.get("quant_algo")) if isinstance(settings, Mapping) else settings
        told = f" by {short(method)}" if method is not None else ""
        raise ModelError(
            f'{where}: the checkpoint is quantised{told} ("{key}"), which is not read; give the model it was made from '
            f"(embedgrad quantises with weights=int8 or int4), or a GGUF file."
        )


def _hf_family(config: Mapping[str, Any], where: str) -> str:
    names = config.get("architectures")
    if names is None and isinstance(config.get("model_type"), str):
        names = [name for name, family in ARCHITECTURES.items() if family == config["model_type"]]
        names = names or [f"model_type {config['model_type']}"]
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    family = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ModelError(
            f"{where}: architecture {short(name)} is not supported; supported are {', '.join(ARCHITECTURES)}."
        )
    if config.get("model_type") not in (None, family):
        raise ModelError(
            f'{where}: "model_type" is {short(config["model_type"])} and "architectures" says {name}; '
            f"they should name the same family."
        )
    return family


def _hf_windows(fields: Fields, family: str, layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer, by the rules of transformers."""
    if family == "llama":
        return (None,) * layers
    if family == "mistral":
        window = fields.take("sliding_window", _DEFAULT_WINDOW)
        return (None if window is None else fields.integer("sliding_window", _DEFAULT_WINDOW),) * layers
    sliding = fields.boolean("use_sliding_window", False)
    size = fields.take("sliding_window", _DEFAULT_WINDOW)
    window = fields.integer("sliding_window", _DEFAULT_WINDOW) if sliding and size is not None else None
    first = fields.take("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
    types = fields.take("layer_types")
    if types is None:
        if window is None:
            return (None,) * layers
        if not isinstance(first, int) or isinstance(first, bool):
            raise ModelError(f'{fields.where}: "max_window_layers" is {short(first)}; it should be a whole number.')
        return tuple(window if layer >= first else None for layer in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
        raise ModelError(
            f'{fields.where}: "layer_types" is {short(types)}; it should name one of {known[0]} and {known[1]} for '
            f"each of the {layers} layers."
        )
    if window is None and "sliding_attention" in types:
        raise ModelError(
            f'{fields.where}: "layer_types" has sliding_attention, but "use_sliding_window" and "sliding_window" give '
            f"no window."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _gguf_window(
    fields: Fields, family: str, hidden: int, embedding: tuple[int, ...], rope: RopeConfig, max_position: int
) -> int | None:
    """The sliding window of every layer.

    GGUF files of the llama architecture also hold Mistral models, and converters leave out the window of Mistral-7B
    v0.1 (arXiv 2310.06825, table 1). Its sizes, base and context together are those of no other published model.
    """
    stated = fields.take("attention.sliding_window")
    if stated not in (None, 0):
        if family != "llama":
            fields.expect("attention.sliding_window", 0)
        return fields.integer("attention.sliding_window")
    if stated is not None or family != "llama":
        return None
    found = (hidden, fields.take("feed_forward_length"), fields.take("block_count"), rope.theta, max_position)
    if found == _MISTRAL_7B and fields.take("attention.head_count_kv") == 8 and embedding[:1] < (_MISTRAL_WORDS,):
        return _DEFAULT_WINDOW
    return None
