"""How much device memory does a step take, by model, weight type and memory policy?

Counted, not measured, by `embedgrad.engine.memory.device_bytes`, which the tests compare with real tensors and the
arena's peak.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

import embedgrad
from bench.harness.markdown import table
from bench.harness.models import QWEN_1_5B, QWEN_7B, config_of
from bench.harness.rows import Row, row
from embedgrad.engine.memory import POLICIES, device_bytes
from embedgrad.engine.packed_pass import PassSize

MODELS = (QWEN_1_5B, QWEN_7B)
CHECKS = ("tests/engine/test_memory.py",)
WEIGHTS = {"compute": "bf16", "int8": "int8", "int4": "int4"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=4096, help="packed tokens of a step (default 4096)")
    parser.add_argument("--targets", type=int, default=None, help="tokens whose loss counts (default: half of all)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens that show a prompt row (default 64)")
    parser.add_argument("--prefix", "--kept", type=int, default=32, help="tokens of the prefix (default 32)")
    parser.add_argument("--arch", default="sm_90", help="whose launch parameters (default sm_90)")


def main(args: argparse.Namespace) -> list[Row]:
    """Count; the rows."""
    targets = args.tokens // 2 if args.targets is None else args.targets
    size = PassSize(args.tokens, args.prefix, targets, args.prompt, targets)
    rows = []
    for model in args.models[:1] if args.quick else args.models:
        config = config_of(model)
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
    heads = ["weights", *(f"{model.removeprefix('Qwen2.5-Math-')} `{p}`" for model in models for p in POLICIES)]
    cells = [
        [told, *(f"{found[told, model, policy] / 2**30:.2f}" for model in models for policy in POLICIES)]
        for told in WEIGHTS.values()
    ]
    return {"memory": table(heads, cells)}


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """None; the table shows it."""
    return {}
