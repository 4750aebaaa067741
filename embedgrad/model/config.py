"""A model's configuration, read from config.json or GGUF metadata.

No field that could change the result is ignored: an unknown field raises a ModelError with its name and value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from embedgrad.model.families import ARCHITECTURES, BY_NAME, COMPOSITE, GGUF_ARCHITECTURES, Family
from embedgrad.model.fields import Fields
from embedgrad.model.layer_kinds import Windows, unrotated_layers
from embedgrad.model.rope import UNROTATED, Divisors, RopeConfig, gguf_ropes, hf_ropes
from embedgrad.util.errors import ModelError
from embedgrad.util.shown import short

# Mistral-7B v0.1: hidden size, width of the MLP, layers, base of the rotations, context; 32,000 words and a few added.
_MISTRAL_7B, _MISTRAL_WORDS, _MISTRAL_WINDOW = (4096, 14336, 32, 10000.0, 32768), 33000, 4096
_MISTRAL_7B_IN = BY_NAME["mistral"].gguf
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
    "use_parallel_residual": False,
}
_GGUF_NEUTRAL_NUMBERS = {"logit_scale": 1.0}  # the same, where the family has no use for the field


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder. What has no number stands in its `Family`.

    intermediate_size: width of the MLP. tied: the head is the embedding table. qkv_bias, output_bias, mlp_bias: whether
    these projections have a bias. qk_norm: queries and keys are normalised. windows[l]: sliding window of layer l, in
    tokens: a token at position p sees the keys whose position is above p - window; None: all keys. max_position:
    context length in tokens. norm_offset: what is added to the stored weight of a norm. query_scale: what q kᵀ is
    multiplied by; None: D^−½. embedding_scale: what embeddings are multiplied by. residual_scale: what the outputs of
    attention and MLP are multiplied by. logit_divisor: what logits are divided by. attention_softcap, logit_softcap: c
    in c·tanh(x/c). rope: the rotations; local_rope: those of layers with a window, where they are others; unrotated:
    layers without.
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
    norm_offset: float = 0.0
    query_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    local_rope: RopeConfig | None = None
    unrotated: tuple[int, ...] = ()

    @property
    def kind(self) -> Family:
        """What sets its architecture apart."""
        return BY_NAME[self.family]

    @property
    def scale(self) -> float:
        """What q kᵀ is multiplied by."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def embedding_scale_in(self, dtype: torch.dtype) -> float:
        """What embeddings are multiplied by in a model that computes in `dtype`."""
        return float(torch.tensor(self.embedding_scale).to(dtype)) if self.kind.root_embedding else self.embedding_scale

    @property
    def input_scale(self) -> float:
        """What other programs that take embeddings expect them to be multiplied by.

        Gemma's embedding module multiplies its rows by √d, and so embeddings that are given to the model must be, too;
        Granite multiplies behind the place where they are given.
        """
        return self.embedding_scale if self.kind.root_embedding else 1.0

    @cached_property
    def ropes(self) -> tuple[tuple[RopeConfig, ...], tuple[int, ...]]:
        """The different rotations of the layers, and which of them each layer has."""

        def of(layer: int) -> RopeConfig:
            if layer in self.unrotated:
                return UNROTATED
            return self.local_rope if self.local_rope is not None and self.windows[layer] is not None else self.rope

        each = [of(layer) for layer in range(self.num_layers)]
        different = tuple(dict.fromkeys(each))
        return different, tuple(map(different.index, each))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str) -> ModelConfig:
        """Reads the contents of a config.json. `where` names the file in messages. Raises ModelError.

        Of a multimodal model it reads the part that is about text.
        """
        _refuse_quantised(config, where)
        config = text_part(config)
        fields = Fields(config, where)
        kind = BY_NAME[_hf_family(config, where)]
        defaults = kind.defaults

        def integer(name: str, none: int | None = None) -> int:
            return fields.integer(name, defaults.get(name, "" if none is None else None), none=none)

        hidden, heads = integer("hidden_size"), integer("num_attention_heads")
        layers = fields.integer("num_hidden_layers", defaults.get("num_hidden_layers", ""), most=_MOST_LAYERS)
        activation = fields.take(kind.gate_field)
        if activation is not None and activation not in kind.gate_values:
            raise ModelError(
                f'{where}: "{kind.gate_field}" is {short(activation)}; supported is "{kind.gate_values[0]}".'
            )
        switches = {name: fields.boolean(name, False) for name in kind.switches}
        max_position = integer("max_position_embeddings")
        windows = kind.windows(fields, defaults, layers)
        rope, local_rope = hf_ropes(fields, kind, max_position)
        result = cls(
            family=kind.name,
            num_layers=layers,
            hidden_size=hidden,
            intermediate_size=integer("intermediate_size"),
            num_heads=heads,
            num_kv_heads=integer("num_key_value_heads", heads),
            head_dim=integer("head_dim", hidden // heads),
            vocab_size=integer("vocab_size"),
            rms_eps=fields.number("rms_norm_eps", defaults.get("rms_norm_eps", 1e-6)),
            rope=rope,
            tied=fields.boolean("tie_word_embeddings", defaults.get("tie_word_embeddings", False)),
            qkv_bias=switches.get("attention_bias", False) or kind.qkv_bias,
            output_bias=switches.get("attention_bias", False),
            mlp_bias=switches.get("mlp_bias", False),
            qk_norm=kind.qk_norm,
            windows=windows,
            max_position=rope.context(max_position),
            norm_offset=kind.norm_offset,
            local_rope=local_rope,
            unrotated=() if kind.unrotated is None else unrotated_layers(fields, kind.unrotated, layers),
            **_numbers(fields, kind, kind.numbers, hidden),
        )
        fields.expect("pruned_heads", {})
        for name, value in kind.neutral.items():
            fields.expect(name, value)
        dropouts = {name for name in config if isinstance(name, str) and _DROPOUT.fullmatch(name)}
        fields.refuse_the_rest(_HARMLESS.union(dropouts, kind.ignored))
        return result._checked(where)

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        where: str,
        shapes: Mapping[str, tuple[int, ...]],
        rope_divisors: Divisors = ((), ()),
    ) -> ModelConfig:
        """Reads GGUF metadata. Raises ModelError.

        shapes: shape of each tensor by its Hugging Face name; the names tell whether the head is tied and which biases
        there are. rope_divisors: what the file holds of them.
        """
        family = metadata.get("general.architecture")
        kind = GGUF_ARCHITECTURES.get(family) if isinstance(family, str) else None
        if kind is None:
            raise ModelError(
                f"{where}: architecture {short(family)} is not supported; supported are "
                f"{', '.join(sorted(GGUF_ARCHITECTURES))}."
            )
        prefix = f"{family}."
        fields = Fields({k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}, where, prefix)
        hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count", same=True)
        layers = fields.integer("block_count", most=_MOST_LAYERS)
        head_dim = fields.integer("attention.key_length", None, none=hidden // heads)
        if fields.integer("attention.value_length", head_dim) != head_dim:
            found = fields.take("attention.value_length")
            raise ModelError(f"{where}: {prefix}attention.value_length is {found}; supported is {head_dim} only.")
        embedding = shapes.get("model.embed_tokens.weight", ())
        max_position = fields.integer("context_length")
        rope, local_rope = gguf_ropes(fields, kind, rope_divisors, max_position, head_dim)
        numbers = _numbers(fields, kind, kind.gguf_numbers, hidden)
        if kind.gguf_query_scalar is not None:
            numbers["query_scale"] = kind.gguf_query_scalar(layers, hidden, heads, head_dim) ** -0.5
        for name, value in (_GGUF_NEUTRAL | _GGUF_NEUTRAL_NUMBERS).items():
            if name not in kind.gguf_numbers.values():
                fields.expect(name, value)
        result = cls(
            family=kind.name,
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
            qkv_bias=f"model.layers.0.{kind.qkv[0]}.bias" in shapes,
            output_bias="model.layers.0.self_attn.o_proj.bias" in shapes,
            mlp_bias=f"model.layers.0.{kind.gate_up[-1]}.bias" in shapes,
            qk_norm=kind.qk_norm,
            windows=_gguf_windows(fields, kind, layers, hidden, embedding, rope, max_position),
            max_position=rope.context(max_position),
            local_rope=local_rope,
            unrotated=() if kind.unrotated is None else unrotated_layers(fields, kind.unrotated, layers),
            **numbers,
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
        turned = self.rope.rotated(self.head_dim) // 2
        short_name = "short_factor" if self.rope.kind == "longrope" else "rope_freqs.weight"
        for name, values in ((short_name, self.rope.divisors), ("long_factor", self.rope.long_divisors)):
            if values and len(values) != turned:
                raise ModelError(f"{where}: {name} has {len(values)} values; it should have {turned}.")
        return self

    def with_long_context(self, where: str) -> ModelConfig:
        """The same with LongRoPE's divisors for long texts. Raises ModelError where the model has none."""
        rope = self.rope
        if rope.kind != "longrope" or not rope.long_divisors or rope.longest <= rope.original_max_position:
            raise ModelError(
                f"{where}: long_context is for models with LongRoPE and divisors for long texts; this one's context "
                f"holds {self.max_position} tokens."
            )
        return replace(self, rope=replace(rope, long=True), max_position=rope.longest)

    @property
    def context_told(self) -> str:
        """The context length for messages, with what makes it longer."""
        rope = self.rope
        if rope.long or not rope.long_divisors or rope.longest <= self.max_position:
            return str(self.max_position)
        return f"{self.max_position} ({rope.longest} with long_context)"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in a checkpoint of this configuration, by its Hugging Face name."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        kind = self.kind
        widths = [q + 2 * kv] if kind.fused else [q, kv, kv]
        linear = [(name, width, hidden, self.qkv_bias) for name, width in zip(kind.qkv, widths, strict=True)]
        linear.append(("self_attn.o_proj", hidden, q, self.output_bias))
        linear += [(name, 2 * ffn // len(kind.gate_up), hidden, self.mlp_bias) for name in kind.gate_up]
        linear.append(("mlp.down_proj", hidden, ffn, self.mlp_bias))
        norms = [(name, hidden) for name in kind.norms if name is not None]
        if self.qk_norm:
            sizes = (q, kv) if kind.wide_qk_norm else (self.head_dim, self.head_dim)
            norms += [("self_attn.q_norm", sizes[0]), ("self_attn.k_norm", sizes[1])]
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


def is_composite(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a multimodal model, whose text part is served."""
    return text_part(config) is not config


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a multimodal model's config.json that is about text; of other models all of it."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    composite = COMPOSITE.get(name) if isinstance(name, str) else None
    text = config.get("text_config")
    if composite is None or not isinstance(text, Mapping):
        return config
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    return {**text, **tied, "architectures": [composite]}


def _numbers(fields: Fields, kind: Family, names: Mapping[str, str], hidden: int) -> dict[str, Any]:
    """The family's numbers by their names in `ModelConfig`; null and what is missing everywhere are left out."""
    found: dict[str, Any] = {"embedding_scale": hidden**0.5} if kind.root_embedding else {}
    for own, name in names.items():
        if fields.take(name, kind.defaults.get(name)) is not None:
            found[own] = fields.number(name, kind.defaults.get(name))
    if "query_scalar" in found:
        found["query_scale"] = found.pop("query_scalar") ** -0.5
    return found


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
            f"{where}: architecture {short(name)} is not supported; supported are "
            f"{', '.join([*ARCHITECTURES, *COMPOSITE])}."
        )
    if config.get("model_type") not in (None, family, *BY_NAME[family].model_types):
        raise ModelError(
            f'{where}: "model_type" is {short(config["model_type"])} and "architectures" says {name}; '
            f"they should name the same family."
        )
    return family


def _gguf_windows(
    fields: Fields,
    kind: Family,
    layers: int,
    hidden: int,
    embedding: tuple[int, ...],
    rope: RopeConfig,
    max_position: int,
) -> Windows:
    """The sliding window of each layer.

    GGUF files of the llama architecture also hold Mistral models, and converters leave out the window of Mistral-7B
    v0.1 (arXiv 2310.06825, table 1). Its sizes, base and context together are those of no other published model.
    """
    stated, window = fields.take("attention.sliding_window"), None
    if stated not in (None, 0):
        if not kind.gguf_windows:
            fields.expect("attention.sliding_window", 0)
        window = fields.integer("attention.sliding_window")
    elif stated is None:
        found = (hidden, fields.take("feed_forward_length"), fields.take("block_count"), rope.theta, max_position)
        if found == _MISTRAL_7B and fields.take("attention.head_count_kv") == 8 and embedding[:1] < (_MISTRAL_WORDS,):
            window = _MISTRAL_WINDOW if kind.gguf == _MISTRAL_7B_IN else None
    every = kind.gguf_every
    return tuple(None if every is not None and (layer + 1) % every == 0 else window for layer in range(layers))
