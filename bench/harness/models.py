"""The shapes of real models, and models in these shapes with random weights.

What a step costs does not depend on the values of the weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from embedgrad import backends
from embedgrad.backends.base import Backend
from embedgrad.engine.model import Model
from embedgrad.model.checkpoint import Checkpoint
from embedgrad.model.config import ModelConfig
from embedgrad.model.read_weights import read_weights
from embedgrad.model.tokenizer import Tokenizer

CPU = torch.device("cpu")
END = "<|end|>"

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


def config_of(name: str, layers: int | None = None) -> ModelConfig:
    """The configuration of a model of SHAPES, or of its first `layers`."""
    config = ModelConfig.from_hf(dict(SHAPES[name]), name)
    return config if layers is None else replace(config, num_layers=layers, windows=config.windows[:layers])


class _RandomTensors:
    """A `TensorSource` of random bfloat16 numbers; on `meta`, of none."""

    def __init__(self, config: ModelConfig, where: torch.device) -> None:
        self._shapes, self._where = config.shapes(), where
        count = 0 if where.type == "meta" else 1 << 20
        self._numbers = (torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def names(self) -> list[str]:
        return list(self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def get(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if self._where.type == "meta":
            return torch.empty(shape, dtype=torch.bfloat16, device=self._where)
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


def byte_tokenizer() -> Tokenizer:
    """A tokenizer that needs no file: one token for each byte, and one that ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: id for id, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([END])
    special = {"eos_token": END}
    return Tokenizer(backend, bos_id=None, eos_ids=[len(alphabet)], adds_bos=False, chat_template=None, special=special)


def random_model(
    config: ModelConfig,
    name: str,
    where: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    ops: Backend | None = None,
    form: str = "stored",
) -> Model:
    """A model with random bfloat16 weights in the form `form` (see `read_weights`), computing in `dtype` on `where`.

    ops: its backend; default: the one that a user would get.
    """
    source = _RandomTensors(config, where)
    chosen = backends.choose("auto", where, dtype) if ops is None else ops
    weights = read_weights(config, source, dtype, where, form=form, products=chosen if chosen.quantized_rows else None)
    return Model(Checkpoint(config, byte_tokenizer(), name, source), weights, chosen, dtype, where)
