"""The shapes of real models, and models in these shapes with random weights.

What a step costs does not depend on the values of the weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from embedgrad.model.config import ModelConfig

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
          "rope_theta": 100_000.0, "max_position_embeddings": 8192, "vocab_size": 49_152,
          "tie_word_embeddings": True}  # fmt: skip
_QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
         "rope_theta": 10000.0, "max_position_embeddings": 4096, "vocab_size": 151_936,
         "tie_word_embeddings": True}  # fmt: skip
QWEN_1_5B, QWEN_7B = "Qwen2.5-Math-1.5B", "Qwen2.5-Math-7B"
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {**_LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3},
    "SmolLM2-360M": {**_LLAMA, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
                     "num_attention_heads": 15, "num_key_value_heads": 5},
    "Qwen2.5-0.5B": {**_QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                     "num_attention_heads": 14, "num_key_value_heads": 2},
    QWEN_1_5B: {**_QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                "num_attention_heads": 12, "num_key_value_heads": 2},
    QWEN_7B: {**_QWEN, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
              "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
              "tie_word_embeddings": False},
}  # fmt: skip
"""config.json, as far as it decides about a step's cost."""


def config_of(name: str) -> ModelConfig:
    """The configuration of a model of SHAPES."""
    return ModelConfig.from_hf(dict(SHAPES[name]), name)


class _RandomTensors:
    """A `TensorSource` of random bfloat16 numbers."""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = config.shapes()
        self._numbers = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def names(self) -> list[str]:
        return list(self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def get(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16)
        count = torch.Size(shape).numel()
        return self._numbers.repeat(-(-count // len(self._numbers)))[:count].view(shape)

    def first_row(self, name: str) -> Tensor:
        return self._numbers[: self._shapes[name][-1]]

    def stored_as(self, name: str) -> None:
        return None

    def raw(self, name: str) -> None:
        return None

    def release(self, name: str) -> None:
        """Nothing: no tensor is quantised."""


def random_model(name: str, layers: int | None = None) -> Any:
    """A model of SHAPES, or its first `layers`, with bfloat16 weights as stored; it computes in float32 on the CPU."""
    from embedgrad import backends
    from embedgrad.engine.model import Model
    from embedgrad.model.checkpoint import Checkpoint, read_checkpoint
    from embedgrad.model.read_weights import read_weights
    from embedgrad.tasks import smollm2

    config = config_of(name)
    if layers is not None:
        config = replace(config, num_layers=layers, windows=config.windows[:layers])
    where, dtype = torch.device("cpu"), torch.float32
    source = _RandomTensors(config)
    ops = backends.choose("auto", where, dtype)
    weights = read_weights(config, source, dtype, where, form="stored")
    tokenizer = read_checkpoint(smollm2.path()).tokenizer
    return Model(Checkpoint(config, tokenizer, name, source), weights, ops, dtype, where)
