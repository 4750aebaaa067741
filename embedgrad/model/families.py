"""The families of models: what sets one architecture apart from another, as data.

The decoder is written once. A `Family` says where its equations (docs/design.md, section 4) differ, what transformers'
and llama.cpp's configurations call each number, and what a missing field means. No other module asks for a family by
name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from embedgrad.model.layer_kinds import WindowRule, by_type, every_layer, from_layer, no_windows, where_unrotated

NormNames = tuple[str | None, str | None, str | None, str | None]
"""Tensors of a layer's norms in front of the attention, behind it, in front of the MLP and behind it; None: no norm."""

IN_FRONT: NormNames = ("input_layernorm", None, "post_attention_layernorm", None)
BEHIND: NormNames = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
ON_BOTH_SIDES: NormNames = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
SILU, GELU_TANH = "silu", "gelu_tanh"


@dataclass(frozen=True)
class Family:
    """One architecture. Fields that are not given are those of Llama.

    name: transformers' model_type. title: what people call it. architectures: transformers' classes; an export writes
    the first. model_types: other spellings of model_type. gguf: the architecture in GGUF files; None: there is none.
    defaults: what transformers' configuration class says where config.json says nothing.

    norms: which norms a layer has. norm_offset: what is added to a norm's weight in config.json's checkpoints (GGUF
    files hold the sum). wide_norms: x̂ is multiplied by the weight before it is rounded to the compute type, not after.
    qk_norm: queries and keys are normalised; wide_qk_norm: over all heads together. gate: SILU or GELU_TANH, and
    gate_field and gate_values: the field that says so. fused: q, k and v are one tensor, and so are gate and up.
    qkv_bias: they always have one. switches: bias fields that config.json may set.
    windows: the rule of the sliding windows. local_theta: base of the rotations in layers that have a window, where it
    is another one. unrotated: every so many layers one is not rotated. partial_rotation: only a part of a head's
    columns may be rotated.
    root_embedding: embeddings are multiplied by √d, rounded to the compute type; vllm_scales: vLLM's class does so with
    the embeddings that it is given, too.
    numbers, gguf_numbers: fields of `ModelConfig` and what a configuration calls them; query_scalar is the square of
    1 / query_scale. neutral: fields that are accepted with this value. ignored: fields that transformers never reads.

    gguf_permuted: rows of q and k stand in the order that interleaves the halves of a head. gguf_windows: a window may
    be stated; gguf_every: every so many layers one has none. gguf_query_scalar: the square of 1 / query_scale, which
    GGUF files do not hold, from layers, d, H and D. gguf_tied: llama.cpp has only models whose head is the table (True)
    or is not (False).
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    gguf: str | None
    defaults: Mapping[str, Any]
    model_types: tuple[str, ...] = ()
    norms: NormNames = IN_FRONT
    norm_offset: float = 0.0
    wide_norms: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    gate: str = SILU
    gate_field: str = "hidden_act"
    gate_values: tuple[str, ...] = ("silu", "swish")
    fused: bool = False
    qkv_bias: bool = False
    switches: tuple[str, ...] = ()
    windows: WindowRule = no_windows
    local_theta: float | None = None
    unrotated: int | None = None
    partial_rotation: bool = False
    root_embedding: bool = False
    vllm_scales: bool = False
    numbers: Mapping[str, str] = field(default_factory=dict)
    neutral: Mapping[str, object] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    gguf_numbers: Mapping[str, str] = field(default_factory=dict)
    gguf_permuted: bool = False
    gguf_windows: bool = False
    gguf_every: int | None = None
    gguf_query_scalar: Callable[[int, int, int, int], float] | None = None
    gguf_tied: bool | None = None

    @property
    def qkv(self) -> tuple[str, ...]:
        """Tensors of the projections that follow the first norm."""
        return ("self_attn.qkv_proj",) if self.fused else ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

    @property
    def gate_up(self) -> tuple[str, ...]:
        """Tensors of the projections that follow the MLP's norm."""
        return ("mlp.gate_up_proj",) if self.fused else ("mlp.gate_proj", "mlp.up_proj")

    @property
    def gguf_names(self) -> dict[str, str]:
        """A layer's tensors: GGUF's name of each."""
        places = zip(("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), self.norms, strict=True)
        projections = ("attn_qkv", "ffn_up") if self.fused else ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
        return (
            {place: name for place, name in places if name is not None}
            | dict(zip(projections, self.qkv + self.gate_up, strict=True))
            | {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
            | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
        )


def _gemma_scalar(layers_27b: int) -> Callable[[int, int, int, int], float]:
    """llama.cpp's rule for Gemma: d / H in the 27B model, which it knows by its layers, else the head size."""
    return lambda layers, hidden, heads, head_dim: hidden / heads if layers == layers_27b else head_dim


_GEMMA: dict[str, Any] = {
    "norms": ON_BOTH_SIDES, "norm_offset": 1.0, "wide_norms": True,
    "gate": GELU_TANH, "gate_field": "hidden_activation", "gate_values": ("gelu_pytorch_tanh",),
    "switches": ("attention_bias",), "root_embedding": True,
    "ignored": ("hidden_act",), "gguf_windows": True,
}  # fmt: skip

_GEMMA_NUMBERS = {"query_scalar": "query_pre_attn_scalar", "logit_softcap": "final_logit_softcapping"}

FAMILIES = (
    Family(
        "llama", "Llama (SmolLM2)", ("LlamaForCausalLM",), "llama",
        {"max_position_embeddings": 2048}, switches=("attention_bias", "mlp_bias"),
        gguf_permuted=True, gguf_windows=True,
    ),
    Family(
        "mistral", "Mistral (Nemo)", ("MistralForCausalLM",), "llama",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        windows=every_layer, gguf_permuted=True, gguf_windows=True,
    ),
    Family(
        "ministral", "Ministral", ("MinistralForCausalLM",), "llama",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        windows=by_type(1, otherwise="sliding_attention"), gguf_permuted=True, gguf_windows=True,
    ),
    Family(
        "qwen2", "Qwen2 and Qwen2.5", ("Qwen2ForCausalLM",), "qwen2",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768}, qkv_bias=True, windows=from_layer,
    ),
    Family(
        "qwen3", "Qwen3", ("Qwen3ForCausalLM",), "qwen3",
        {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
        qk_norm=True, switches=("attention_bias",), windows=from_layer,
    ),
    Family(
        "olmo2", "OLMo 2", ("Olmo2ForCausalLM",), "olmo2",
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        norms=BEHIND, wide_norms=True, qk_norm=True, wide_qk_norm=True, switches=("attention_bias",), gguf_tied=False,
    ),
    Family(
        "smollm3", "SmolLM3", ("SmolLM3ForCausalLM",), "smollm3",
        {
            "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "tie_word_embeddings": True,
            "sliding_window": None,
        },
        switches=("attention_bias", "mlp_bias"), windows=where_unrotated, unrotated=4, gguf_permuted=True,
    ),
    Family(
        "phi3", "Phi-3 and Phi-4-mini", ("Phi3ForCausalLM",), "phi3",
        {
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        fused=True, windows=every_layer, partial_rotation=True,
        neutral={"interpolate_factor": 1, "full_attn_mod": 1}, gguf_windows=True,
    ),
    Family(
        "granite", "Granite 3", ("GraniteForCausalLM",), "granite",
        {"max_position_embeddings": 2048, "attention_multiplier": 1.0},
        switches=("attention_bias", "mlp_bias"),
        numbers={
            "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
            "query_scale": "attention_multiplier", "logit_divisor": "logits_scaling",
        },
        gguf_numbers={
            "embedding_scale": "embedding_scale", "residual_scale": "residual_scale", "query_scale": "attention.scale",
            "logit_divisor": "logit_scale",
        },
        gguf_permuted=True,
    ),
    Family(
        "gemma2", "Gemma 2", ("Gemma2ForCausalLM",), "gemma2",
        {
            "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
        windows=by_type(2), neutral={"use_bidirectional_attention": False},
        numbers=_GEMMA_NUMBERS | {"attention_softcap": "attn_logit_softcapping"},
        vllm_scales=True, gguf_every=2, gguf_query_scalar=_gemma_scalar(46), gguf_tied=True,
        gguf_numbers={"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"},
        **_GEMMA,
    ),
    Family(
        "gemma3_text", "Gemma 3", ("Gemma3ForCausalLM",), "gemma3",
        {
            "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
            "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_theta": 1e6,
        },
        qk_norm=True, windows=by_type(6), local_theta=10000.0, numbers=_GEMMA_NUMBERS,
        neutral={"use_bidirectional_attention": False, "attn_logit_softcapping": None},  # a cap that no model has
        gguf_every=6, gguf_query_scalar=_gemma_scalar(62),
        **_GEMMA,
    ),
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}
ARCHITECTURES = {name: family.name for family in FAMILIES for name in family.architectures}
GGUF_ARCHITECTURES = {family.gguf: family for family in reversed(FAMILIES) if family.gguf is not None}
"""The family of each architecture in GGUF files: the first that has it."""
COMPOSITE = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
"""Multimodal classes whose text part is served, and the class of that part."""


def table() -> str:
    """The families as a Markdown table, which README.md shows."""
    rows = [(f.title, " ".join(f"`{name}`" for name in f.architectures), f"`{f.gguf}`", _own(f)) for f in FAMILIES]
    head = ("family", "class in config.json", "GGUF", "beside Llama's equations"), ("---",) * 4
    return "\n".join(f"| {' | '.join(row)} |" for row in (*head, *rows))


def _own(f: Family) -> str:
    places = {IN_FRONT: "", BEHIND: "norms behind attention and MLP", ON_BOTH_SIDES: "norms in front and behind"}
    found = {
        places[f.norms]: True,
        "norms by 1 + w": f.norm_offset == 1,
        "qk-norm over all heads": f.wide_qk_norm,
        "qk-norm": f.qk_norm and not f.wide_qk_norm,
        "GELU": f.gate == GELU_TANH,
        "embeddings times √d": f.root_embedding,
        "q, k, v have biases": f.qkv_bias,
        "fused projections": f.fused,
        "sliding windows": f.windows is not no_windows,
        "layers without rotation": f.unrotated is not None,
        "partial rotation": f.partial_rotation,
        "another rotation in layers with a window": f.local_theta is not None,
        "softcaps": "logit_softcap" in f.numbers,
        "multipliers": "residual_scale" in f.numbers,
    }
    return ", ".join(text for text, there in found.items() if text and there) or "–"
