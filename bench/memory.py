"""How much device memory does a step take, by model, weight type and memory policy?

Counted, not measured: `embedgrad.memory.device_bytes`, which the tests hold against real tensors and the arena's peak.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

import embedgrad
from bench.markdown import table
from bench.rows import Row, row
from embedgrad.memory import POLICIES, StepSize, device_bytes
from embedgrad.model.config import ModelConfig

QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 4096, "num_hidden_layers": 28}  # fmt: skip
MODELS = {
    "Qwen2.5-Math-1.5B": {
        **QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "Qwen2.5-Math-7B": {
        **QWEN, "hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152_064, "tie_word_embeddings": False,
    },
}  # fmt: skip
CHECKS = ("tests/engine/test_memory.py",)
WEIGHTS = {"compute": "bf16", "int8": "int8", "int4": "int4"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=4096, help="packed tokens of a step (default 4096)")
    parser.add_argument("--targets", type=int, default=None, help="tokens whose loss counts (default: half of all)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens that show a prompt row (default 64)")
    parser.add_argument("--kept", type=int, default=32, help="kept tokens in front (default 32)")
    parser.add_argument("--arch", default="sm_90", help="whose launch parameters (default sm_90)")


def main(args: argparse.Namespace) -> list[Row]:
    """Count; the rows."""
    targets = args.tokens // 2 if args.targets is None else args.targets
    size = StepSize(args.tokens, args.kept, targets, args.prompt, targets)
    rows = []
    for model in args.models[:1] if args.quick else args.models:
        config = ModelConfig.from_hf(MODELS[model], model)
        for weights, told in WEIGHTS.items():
            for policy in POLICIES:
                found = device_bytes(config, size, torch.bfloat16, policy, weights, args.arch)
                rows.append(row(
                    "memory", "embedgrad", f"embedgrad {embedgrad.__version__}", [found.total], counted=True,
                    unit="bytes", case={"model": model, "weight_type": told, "policy": policy, "arch": args.arch},
                    size=vars(size), **vars(found),
                ))  # fmt: skip
    return rows


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`memory`: GiB by weight type, model and policy."""
    models = list(dict.fromkeys(str(one.case["model"]) for one in rows))
    found = {(one.case["weight_type"], one.case["model"], one.case["policy"]): one.median for one in rows}
    heads = [
        "weights",
        *(f"{model.removeprefix('Qwen2.5-Math-')} `{policy}`" for model in models for policy in POLICIES),
    ]
    cells = [
        [told, *(f"{found[told, model, policy] / 2**30:.2f}" for model in models for policy in POLICIES)]
        for told in WEIGHTS.values()
    ]
    return {"memory": table(heads, cells)}


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """None: the table says it."""
    return {}
