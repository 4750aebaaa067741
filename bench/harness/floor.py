"""The matrix-product floor of a step: how long its necessary operations take at BLAS's own rate.

Necessary are the linear products, forward and backward, at the tokens that need them. The last layer's queries, output
and MLP are needed at the predicting tokens, the first layer's backward of q, k and v at the prompt's tokens. Attention
needs 4 operations forward and 8 backward for each visible pair, head and head dimension. Each product is timed at its
own shape. Attention counts at the mean rate of the products.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from functools import cache
from typing import Any

import torch

from bench.harness.clock import take_turns
from embedgrad.engine.tree import TokenTree
from embedgrad.model.config import ModelConfig

Shape = tuple[int, int, int]  # rows, inner, columns


def products(config: ModelConfig, tree: TokenTree) -> Counter[tuple[str, Shape]]:
    """How often the step multiplies each shape; "forward" is x Wᵀ, "backward" is dy W."""
    tokens, predicting, shown = tree.num_tokens, len(tree.predicting), len(tree.prompt_positions)
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_layers
    q, kv = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    count: Counter[tuple[str, Shape]] = Counter()

    def both(rows: int, inputs: int, outputs: int, times: int = 1) -> None:
        count["forward", (rows, inputs, outputs)] += times
        count["backward", (rows, outputs, inputs)] += times

    rest = layers - 1  # all layers but the last
    for rows, times in ((tokens, rest), (predicting, 1)):
        both(rows, q, d, times)
        both(rows, d, 2 * f, times)
        both(rows, f, d, times)
    count["forward", (tokens, d, q + kv)] += rest
    count["backward", (tokens, q + kv, d)] += rest - 1
    count["backward", (shown, q + kv, d)] += 1
    both(predicting, d, q)
    both(tokens, d, kv)
    both(len(tree.target_ids), d, config.vocab_size)
    return count


def visible_pairs(config: ModelConfig, tree: TokenTree) -> int:
    """Visible query-key pairs of all layers."""

    @cache
    def pairs(window: int | None, last: bool) -> int:
        mask = tree.mask(window)
        return int((mask.select_queries(tree.predicting) if last else mask).visible().sum())

    return sum(pairs(window, layer == config.num_layers - 1) for layer, window in enumerate(config.windows))


def operations(config: ModelConfig, tree: TokenTree) -> tuple[int, int]:
    """Necessary operations of the linear products and of attention; a multiply-add is two."""
    linear = sum(2 * math.prod(shape) * times for (_, shape), times in products(config, tree).items())
    return linear, 12 * visible_pairs(config, tree) * config.num_heads * config.head_dim


def seconds(config: ModelConfig, tree: TokenTree, where: torch.device, repeats: int = 5) -> float:
    """The floor on this machine, now, with torch's threads; float32 on a CPU, bfloat16 on a GPU."""
    spent = sum(times * _time(way, *shape, where, repeats) for (way, shape), times in products(config, tree).items())
    linear, attention = operations(config, tree)
    return spent * (1 + attention / linear)


def _time(way: str, rows: int, inner: int, columns: int, where: torch.device, repeats: int) -> float:
    """Median seconds of one product. Three copies of the matrix take turns, so that none stays in the cache."""
    kind: dict[str, Any] = {"dtype": torch.float32 if where.type == "cpu" else torch.bfloat16, "device": where}
    x, out = torch.randn(rows, inner, **kind), torch.empty(rows, columns, **kind)
    shape = (columns, inner) if way == "forward" else (inner, columns)
    weights = itertools.cycle([torch.randn(*shape, **kind) for _ in range(3)])

    def product() -> None:
        weight = next(weights)
        torch.mm(x, weight.T if way == "forward" else weight, out=out)

    return statistics.median(take_turns([product], repeats, where)[0])
