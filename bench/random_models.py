"""Models in real shapes with random weights: what a step costs does not depend on what the weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bench.memory import MODELS as QWEN_MATH
from embedgrad import backends
from embedgrad.model.checkpoint import Checkpoint, read_checkpoint
from embedgrad.model.config import ModelConfig
from embedgrad.model.model import Model
from embedgrad.model.weights import read_weights

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
          "rope_theta": 100_000.0, "max_position_embeddings": 8192, "vocab_size": 49_152,
          "tie_word_embeddings": True}  # fmt: skip
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "SmolLM2-135M": {**_LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3},
    "SmolLM2-360M": {**_LLAMA, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
                     "num_attention_heads": 15, "num_key_value_heads": 5},
    "Qwen2.5-0.5B": {**QWEN_MATH["Qwen2.5-Math-1.5B"], "hidden_size": 896, "intermediate_size": 4864,
                     "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
    "Qwen2.5-Math-1.5B": QWEN_MATH["Qwen2.5-Math-1.5B"],
}  # fmt: skip


class _RandomTensors:
    """A `TensorSource` of bfloat16 numbers."""

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

    def raw(self, name: str) -> None:
        return None


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from embedgrad.tasks import smollm2

    return read_checkpoint(smollm2.path()).tokenizer


def random_model(name: str, layers: int | None = None, backend: str = "auto") -> Model:
    """A model of SHAPES, or of its first `layers`, with bfloat16 weights as stored; computes in float32 on the CPU."""
    config = ModelConfig.from_hf(dict(SHAPES[name]), name)
    if layers is not None:
        config = replace(config, num_layers=layers, windows=config.windows[:layers])
    where, dtype = torch.device("cpu"), torch.float32
    source = _RandomTensors(config)
    ops = backends.choose(backend, where, dtype)
    weights = read_weights(config, source, dtype, where, form="stored")
    return Model(Checkpoint(config, _tokenizer(), name, source), weights, ops, dtype, where)
