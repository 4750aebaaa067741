"""Checks the gradient of this installation: the engine against autograd on a tiny random model.

The tiny model is written to a temporary folder and opened like any other model, so the check covers files, tokenizer,
rendering, packing and backend. The reference uses none of them: it computes one whole sequence at a time in float64.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from embedgrad.data.example import Example
from embedgrad.engine.gradient import loss_and_grad
from embedgrad.engine.model import load_model
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import Rendered, render
from embedgrad.prompt.template import Template

# Largest relative errors. A right gradient has errors of 3e-15, 1e-6 and 4e-2 (measured; bfloat16 also rounds the
# weights); the error of a wrong gradient is near 1.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-1}
_LAYERS, _HEADS, _KV_HEADS, _HEAD_DIM, _FFN, _EPS, _THETA = 2, 4, 2, 8, 48, 1e-5, 10000.0
_HIDDEN = _HEADS * _HEAD_DIM
_EXAMPLES = [
    Example("It was a joy.", "good"),
    Example("Two hours of pain, and then the end.", "bad", 2.0),
    Example("?", "so so"),
]


@dataclass(frozen=True)
class Check:
    """The result of a check: relative errors of loss and gradient (Euclidean norm), and whether both are in bounds."""

    backend: str
    dtype: str
    device: str
    loss_error: float
    gradient_error: float
    passed: bool


def check_gradient(backend: str, dtype: torch.dtype, device: str = "cpu") -> Check:
    """Compares loss and gradient of a small batch with autograd. Raises BackendError where the backend cannot run."""
    with tempfile.TemporaryDirectory(prefix="embedgrad-check-") as name:
        weights = write_tiny_model(Path(name))
        model = load_model(name, dtype=dtype, backend=backend, device=device)
        template = Template.text("{prompt} Question: {query} Answer: {prompt}")
        prompt = SoftPrompt.from_text(model, "Say good or bad.", template)
        noise = torch.randn(prompt.anchor.shape, generator=torch.Generator().manual_seed(1))
        prompt = prompt.replace(embeddings=prompt.anchor + 0.1 * noise)
        loss, gradient = loss_and_grad(model, prompt, _EXAMPLES)
        sequences = [render(model, prompt, example) for example in _EXAMPLES]
        model.release_memory()
        del model  # it maps files that are about to be deleted
    truth, expected = _autograd(weights, prompt.embeddings.double(), sequences)
    loss_error = abs(loss - truth) / abs(truth)
    gradient_error = float((gradient.double().cpu() - expected).norm() / expected.norm())
    passed = max(loss_error, gradient_error) <= TOLERANCE[dtype]  # also False for NaN
    return Check(backend, str(dtype).removeprefix("torch."), device, loss_error, gradient_error, passed)


def write_tiny_model(folder: Path) -> dict[str, Tensor]:
    """Writes a random Llama of 2 layers with a byte tokenizer. Returns its weights by name (float32)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab = len(alphabet) + 1
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": _HIDDEN,
        "intermediate_size": _FFN, "num_hidden_layers": _LAYERS, "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS, "vocab_size": vocab, "max_position_embeddings": 512, "rms_norm_eps": _EPS,
        "rope_theta": _THETA, "tie_word_embeddings": False, "attention_bias": False, "eos_token_id": vocab - 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}), "utf-8")
    kv = _KV_HEADS * _HEAD_DIM
    shapes = {"model.embed_tokens.weight": (vocab, _HIDDEN), "lm_head.weight": (vocab, _HIDDEN)}
    for i in range(_LAYERS):
        for name, shape in {
            "self_attn.q_proj": (_HIDDEN, _HIDDEN), "self_attn.k_proj": (kv, _HIDDEN),
            "self_attn.v_proj": (kv, _HIDDEN), "self_attn.o_proj": (_HIDDEN, _HIDDEN),
            "mlp.gate_proj": (_FFN, _HIDDEN), "mlp.up_proj": (_FFN, _HIDDEN), "mlp.down_proj": (_HIDDEN, _FFN),
        }.items():  # fmt: skip
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    norms = ["model.norm.weight"]
    norms += [
        f"model.layers.{i}.{name}.weight"
        for i in range(_LAYERS)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    weights |= {name: 1.0 + 0.2 * torch.randn(_HIDDEN, generator=generator) for name in norms}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def _autograd(weights: dict[str, Tensor], embeddings: Tensor, sequences: list[Rendered]) -> tuple[float, Tensor]:
    """(loss, gradient of the prompt rows [k, d]) of _EXAMPLES by autograd, in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    e = embeddings.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for sequence, example in zip(sequences, _EXAMPLES, strict=True):
        shown = torch.tensor(sequence.prompt_rows)
        ids = torch.tensor(sequence.ids)
        x = torch.where((shown >= 0)[:, None], e[shown.clamp_min(0)], w["model.embed_tokens.weight"][ids])
        logits = _forward(w, x) @ w["lm_head.weight"].T  # [T, V]
        mask = torch.tensor(sequence.target_mask)[1:]
        nll = torch.nn.functional.cross_entropy(logits[:-1][mask], ids[1:][mask])
        total = total + example.weight * nll
    loss = total / sum(example.weight for example in _EXAMPLES)
    loss.backward()
    assert e.grad is not None
    return float(loss.detach()), e.grad


def _forward(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Hidden states [T, d] after the final norm of a Llama, from the input embeddings x [T, d] of one sequence."""
    length = len(x)
    frequency = _THETA ** (-torch.arange(0, _HEAD_DIM, 2, dtype=torch.float64) / _HEAD_DIM)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency  # [T, D/2]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + _EPS).rsqrt() * w[name]

    def rotated(x: Tensor) -> Tensor:  # [T, heads, D]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    for i in range(_LAYERS):
        at = f"model.layers.{i}."
        normed = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            (normed @ w[f"{at}self_attn.{name}_proj.weight"].T).view(length, -1, _HEAD_DIM) for name in ("q", "k", "v")
        )
        k, v = (part.repeat_interleave(_HEADS // _KV_HEADS, dim=1) for part in (rotated(k), v))
        scores = torch.einsum("ihd,jhd->hij", rotated(q), k) / math.sqrt(_HEAD_DIM)
        attention = scores.masked_fill(future, -math.inf).softmax(-1)
        o = torch.einsum("hij,jhd->ihd", attention, v).reshape(length, -1)
        x = x + o @ w[at + "self_attn.o_proj.weight"].T
        normed = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (normed @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight")
