"""Makes a transformers model that shares the weights of one of our models, for comparisons, benchmarks and tests."""

from __future__ import annotations

from typing import Any

import torch

from embedgrad.engine.model import Model
from embedgrad.util.errors import ConfigError

FAMILIES = ("llama", "qwen2")


def no_twin(model: Model) -> str | None:
    """Why `model` cannot have a transformers twin, in one sentence; None where it can."""
    c = model.config
    if c.family not in FAMILIES or c.rope.kind != "default":
        return (
            f"a transformers twin is made of {' and '.join(FAMILIES)} with plain rotations only, not of {model.name}."
        )
    if model.device.type != "cpu" or getattr(model.weights.layers[0].out.parts[0], "dtype", None) != torch.float32:
        return "a transformers twin shares float32 weights on the CPU; load the model with weights=fp32 there."
    return None


def transformers_twin(model: Model, attention: str = "eager") -> Any:
    """A frozen float32 transformers model that shares the weights of `model`, a Llama or Qwen2 with unscaled rotations.

    attention: transformers' attention implementation. Raises ConfigError where `no_twin` gives a reason.
    """
    problem = no_twin(model)
    if problem:
        raise ConfigError(problem)
    return twin_sharing(model, attention)


def twin_sharing(model: Model, attention: str) -> Any:
    """The twin of a model for which only its matrices' form is known to be right: one tensor for each, in one type.

    It is in that type, and on the model's device.
    """
    import transformers

    c = model.config
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    config_class, model_class = classes[c.family]
    config = config_class(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        rms_norm_eps=c.rms_eps, rope_parameters={"rope_theta": c.rope.theta, "rope_type": "default"},
        tie_word_embeddings=c.tied, max_position_embeddings=c.max_position, attn_implementation=attention,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device("meta"):  # no weights are drawn only to be replaced
        twin = model_class(config).eval()
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config).to(model.device)  # its frequencies are in no state
    heads = c.num_heads * c.head_dim
    kv = c.num_kv_heads * c.head_dim
    state = {"model.embed_tokens.weight": model.weights.embedding, "model.norm.weight": model.weights.final_norm}
    for i, layer in enumerate(model.weights.layers):
        at = f"model.layers.{i}."
        q, k, v = layer.qkv.parts[0].split((heads, kv, kv))
        gate, up = layer.gate_up.parts[0].chunk(2)
        state |= {
            at + "self_attn.q_proj.weight": q, at + "self_attn.k_proj.weight": k, at + "self_attn.v_proj.weight": v,
            at + "self_attn.o_proj.weight": layer.out.parts[0], at + "mlp.gate_proj.weight": gate,
            at + "mlp.up_proj.weight": up, at + "mlp.down_proj.weight": layer.down.parts[0],
            at + "input_layernorm.weight": layer.attention_norm, at + "post_attention_layernorm.weight": layer.mlp_norm,
        }  # fmt: skip
        if layer.qkv.bias is not None:
            bias = zip("qkv", layer.qkv.bias.split((heads, kv, kv)), strict=True)
            state |= {f"{at}self_attn.{name}_proj.bias": b for name, b in bias}
    state["lm_head.weight"] = model.weights.head.parts[0]
    missing, unexpected = twin.load_state_dict(state, strict=False, assign=True)
    assert not unexpected
    assert not missing
    twin.tie_weights()
    return twin.requires_grad_(False)
