"""Makes a transformers model that shares the weights of one of our models, for comparisons, benchmarks and tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embedgrad.engine.model import Model
from embedgrad.exports.hf_config import model_fields
from embedgrad.model.config import ModelConfig
from embedgrad.model.rope import rotary_order
from embedgrad.model.weights import LayerWeights
from embedgrad.util.errors import ConfigError, ExportError


def no_twin(model: Model) -> str | None:
    """Why `model` cannot have a transformers twin, in one sentence; None where it can."""
    if model.config.rope.long:
        return (
            "transformers takes LongRoPE's rotations for long texts by a text's length; load it without long_context."
        )
    try:
        model_fields(model.config, model.name)
    except ExportError as error:
        return f"a transformers twin is made from the model's description, and {error}"
    weights = model.weights
    first = weights.layers[0] if isinstance(weights.layers, list) else None
    matrices = () if first is None else (first.qkv, first.out, first.gate_up, first.down, weights.head)
    if model.device.type != "cpu" or first is None or not all(map(_is_plain, matrices)):
        return "a transformers twin shares float32 weights on the CPU; load the model with weights=fp32 there."
    return None


def _is_plain(matrix: Any) -> bool:
    return len(matrix.parts) == 1 and getattr(matrix.parts[0], "dtype", None) == torch.float32


def transformers_twin(model: Model, attention: str = "eager") -> Any:
    """A frozen float32 transformers model with the weights of `model`, which it shares but for norms that are stored
    in another form.

    attention: transformers' attention implementation; "eager" where the model's class has not got it. Raises
    ConfigError where `no_twin` gives a reason.
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
    from transformers.initialization import no_init_weights

    c = model.config
    fields = model_fields(c, model.name) | {"bos_token_id": None, "eos_token_id": None}
    model_class = getattr(transformers, fields.pop("architectures")[0])
    if not getattr(model_class, f"_supports_{attention}", True):  # classes that cap scores have "eager" only
        attention = "eager"
    config = model_class.config_class(**fields, attn_implementation=attention)
    with no_init_weights():  # memory that is never written takes no room
        twin = model_class(config).eval()
    missing, unexpected = twin.load_state_dict(_state(model), strict=False, assign=True)
    assert not unexpected
    assert not missing
    twin.tie_weights()
    return twin.to(model.device).requires_grad_(False)


def _state(model: Model) -> dict[str, Tensor]:
    """The weights by transformers' names, in the form in which its checkpoints hold them."""
    c, weights = model.config, model.weights
    final = weights.final_norm if c.logit_divisor == 1 else weights.final_norm * c.logit_divisor
    state = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": _stored_norm(c, final),
        "lm_head.weight": weights.head.parts[0],
    }
    for index, layer in enumerate(weights.layers):
        for name, tensor in _layer_state(c, layer).items():
            state[f"model.layers.{index}.{name}"] = tensor
    return state


def _layer_state(c: ModelConfig, layer: LayerWeights) -> dict[str, Tensor]:
    kind, widths = c.kind, (c.num_heads * c.head_dim, *(2 * [c.num_kv_heads * c.head_dim]))
    state: dict[str, Tensor] = {}

    def add(names: tuple[str, ...], sizes: tuple[int, ...], what: str, stacked: Tensor) -> None:
        parts = [stacked] if len(names) == 1 else stacked.split(sizes)
        state.update({f"{name}.{what}": part for name, part in zip(names, parts, strict=True)})

    add(kind.qkv, widths, "weight", _turned_back(c, layer.qkv.parts[0]))
    add(kind.gate_up, (c.intermediate_size,) * 2, "weight", layer.gate_up.parts[0])
    state |= {"self_attn.o_proj.weight": layer.out.parts[0], "mlp.down_proj.weight": layer.down.parts[0]}
    if layer.qkv.bias is not None:
        add(kind.qkv, widths, "bias", _turned_back(c, layer.qkv.bias))
    if layer.gate_up.bias is not None:
        add(kind.gate_up, (c.intermediate_size,) * 2, "bias", layer.gate_up.bias)
    beside = (("self_attn.o_proj", layer.out), ("mlp.down_proj", layer.down))
    state |= {f"{name}.bias": matrix.bias for name, matrix in beside if matrix.bias is not None}
    places = (layer.attention_norm, layer.attention_post_norm, layer.mlp_norm, layer.mlp_post_norm)
    norms = [
        *zip(kind.norms, places, strict=True),
        ("self_attn.q_norm", layer.q_norm),
        ("self_attn.k_norm", layer.k_norm),
    ]
    state |= {f"{name}.weight": _stored_norm(c, norm) for name, norm in norms if norm is not None}
    return state


def _stored_norm(c: ModelConfig, weight: Tensor) -> Tensor:
    return weight - c.norm_offset if c.norm_offset else weight


def _turned_back(c: ModelConfig, rows: Tensor) -> Tensor:
    """Rows of q, k and v in the order of the checkpoint, which `rotary_order` changes where a part of a head turns."""
    order = rotary_order(c.rope, c.head_dim)
    if order is None:
        return rows
    turned = (c.num_heads + c.num_kv_heads) * c.head_dim
    heads = rows[:turned].unflatten(0, (-1, c.head_dim))
    return torch.cat([heads[:, order.argsort().to(rows.device)].flatten(0, 1), rows[turned:]])
