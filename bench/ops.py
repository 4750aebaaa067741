"""How close does each native operation come to what memory allows, and tree attention to torch's own attention?

SmolLM2-135M's sizes and the trees of `bench step`. Every operation is first held against the reference in float64; one
that is wrong gives no figure. A row-wise operation is measured in bytes it must move, against a copy of as many bytes
in the same turn. Tree attention (forward, backward) is measured against `scaled_dot_product_attention` given the same
tree in the two ways it could be: as a mask over the packed tokens, and as a dense causal batch that repeats the prompt
per query; the faster one counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.step import SHAPES, TARGETS, _task
from embedgrad.backends import native, reference
from embedgrad.model.config import ModelConfig
from embedgrad.rendering import render
from embedgrad.tree import TokenTree, build_tree

Timed = Callable[[], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help="prompt/query/batch, default: %(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="timings of each (default 15)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, print tables, and return the rows."""
    import embedgrad
    from embedgrad.tasks import smollm2

    torch.set_num_threads(args.threads)
    repeats = 5 if args.quick else args.repeats
    model = embedgrad.load_model(smollm2.path(), weights="stored")
    rows = []
    for shape in args.shapes[:1] if args.quick else args.shapes:
        soft, examples = _task(model, *(int(n) for n in shape.split("/")))
        tree = build_tree([render(model, soft, example) for example in examples])
        found = _row_wise(model.config, tree.num_tokens, repeats) + _attention(model.config, tree, shape, repeats)
        rows += [{"question": "ops", "shape": shape, "threads": args.threads, **row} for row in found]
        _print(shape, tree.num_tokens, found)
    return rows


def _print(shape: str, tokens: int, rows: list[dict[str, Any]]) -> None:
    print(f"\nprompt/query/batch {shape}: {tokens} packed tokens")
    for row in rows:
        if "bytes" in row:
            print(
                f"{row['op']:<26} {row['seconds'] * 1e6:9.0f} us {row['bytes'] / row['seconds'] / 1e9:7.1f} GB/s, "
                f"{row['of_copy']:.0%} of a copy"
            )
        else:
            print(
                f"{row['op']:<26} {row['seconds'] * 1e6:9.0f} us, torch: masked {row['masked_seconds'] * 1e6:.0f} us, "
                f"dense {row['dense_seconds'] * 1e6:.0f} us: {row['speed_up']:.2f} times as fast"
            )


def _times(repeats: int, *contenders: Timed) -> list[float]:
    """Median seconds of each; they take turns."""
    found: list[list[float]] = [[] for _ in contenders]
    for number in range(repeats + 1):
        for times, run in zip(found, contenders, strict=True):
            started = time.perf_counter()
            run()
            if number:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in found]


def _check(name: str, found: Tensor, truth: Tensor, tolerance: float = 1e-5) -> None:
    error = float((found.double() - truth).norm() / truth.norm())
    if not error <= tolerance:
        raise SystemExit(f"{name} is wrong by {error:.1e}: no figure.")


def _row_wise(config: ModelConfig, tokens: int, repeats: int) -> list[dict[str, Any]]:
    d, f, heads = config.hidden_size, config.intermediate_size, (config.num_heads, config.num_kv_heads, config.head_dim)
    x, dy, w = torch.randn(tokens, d), torch.randn(tokens, d), torch.rand(d) + 0.5
    gate_up, da = torch.randn(tokens, 2 * f), torch.randn(tokens, f)
    qkv = torch.randn(tokens, (heads[0] + 2 * heads[1]) * heads[2])
    rotated = (heads[0] + heads[1]) * heads[2]
    angles = torch.rand(tokens, heads[2] // 2)
    cos, sin = angles.cos(), angles.sin()
    eps = config.rms_eps
    rows_out, wide_out, act_out = torch.empty_like(x), torch.empty_like(gate_up), torch.empty_like(da)

    def double(name: str, *inputs: Any, out: Tensor, key: str = "out", **options: Any) -> Tensor:
        wide = [i.double() if isinstance(i, Tensor) else i for i in inputs]
        target = out.double()
        getattr(reference, name)(*wide, **{key: target}, **options)
        return target

    n = x.numel()
    cases: dict[str, tuple[Callable[[], Tensor], Tensor, int, Timed]] = {
        "rms_norm": (
            lambda: native.rms_norm(x, w, eps, out=rows_out), double("rms_norm", x, w, eps, out=rows_out), 2 * n,
            lambda: native.rms_norm(x, w, eps, out=rows_out),
        ),
        "rms_norm_backward": (
            lambda: native.rms_norm_backward(dy, x, w, eps, dx=rows_out.zero_()),
            double("rms_norm_backward", dy, x, w, eps, out=torch.zeros_like(x), key="dx"), 4 * n,
            lambda: native.rms_norm_backward(dy, x, w, eps, dx=rows_out),
        ),
        "swiglu": (
            lambda: native.swiglu(gate_up, out=act_out), double("swiglu", gate_up, out=act_out), 3 * tokens * f,
            lambda: native.swiglu(gate_up, out=act_out),
        ),
        "swiglu_backward": (
            lambda: native.swiglu_backward(da, gate_up, out=wide_out),
            double("swiglu_backward", da, gate_up, out=wide_out), 5 * tokens * f,
            lambda: native.swiglu_backward(da, gate_up, out=wide_out),
        ),
    }  # fmt: skip
    turned = qkv.clone()
    truth = reference.rope(qkv.double(), cos.double(), sin.double(), heads)
    cases["rope"] = (
        lambda: native.rope(turned.copy_(qkv), cos, sin, heads), truth, 2 * tokens * rotated + 2 * cos.numel(),
        lambda: native.rope(turned, cos, sin, heads),
    )  # fmt: skip
    rows = []
    for name, (checked, expected, numbers, run) in cases.items():
        _check(name, checked(), expected)
        source, target = torch.randn(numbers // 2), torch.empty(numbers // 2)
        seconds, copy = _times(repeats, run, lambda source=source, target=target: target.copy_(source))  # type: ignore[misc]
        rows.append({"op": name, "bytes": 4 * numbers, "seconds": seconds, "of_copy": copy / seconds})
    return rows


def _attention(config: ModelConfig, tree: TokenTree, shape: str, repeats: int) -> list[dict[str, Any]]:
    h, g, d = config.num_heads, config.num_kv_heads, config.head_dim
    tokens, scale = tree.num_tokens, d**-0.5
    q, k, v, do = (torch.randn(tokens, n, d) for n in (h, g, g, h))
    mask = tree.mask()
    out, lse = torch.empty_like(q), torch.empty(tokens, h)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def forward() -> None:
        native.tree_attention(q, k, v, mask, scale=scale, out=out, lse=lse)

    def backward() -> None:
        native.tree_attention_backward(do, q, k, v, out, lse, mask, scale=scale, dq=dq, dk=dk, dv=dv)

    forward()
    backward()
    masked = _sdpa(q, k, v, do, scale, mask=mask.visible())
    truth = _sdpa(q.double(), k.double(), v.double(), do.double(), scale, mask=mask.visible())
    _check("tree_attention", out, truth.forward().transpose(0, 1))
    truth.backward()
    for name, found, leaf in (("dq", dq, truth.q), ("dk", dk, truth.k), ("dv", dv, truth.v)):
        assert leaf.grad is not None
        _check(f"tree_attention_backward {name}", found, leaf.grad.transpose(0, 1))
    prompt, query, batch = (int(n) for n in shape.split("/"))
    length = prompt + query + TARGETS - 1
    repeated = [torch.randn(batch * length, n, d) for n in (h, g, g, h)]
    dense = _sdpa(repeated[0], repeated[1], repeated[2], repeated[3], scale, batch=batch)
    rows = []
    for name, ours, first, second in (
        ("tree_attention", forward, masked.forward, dense.forward),
        ("tree_attention_backward", backward, masked.backward, dense.backward),
    ):
        seconds, with_mask, without = _times(repeats, ours, first, second)
        rows.append({
            "op": name, "seconds": seconds, "masked_seconds": with_mask, "dense_seconds": without,
            "speed_up": min(with_mask, without) / seconds,
        })  # fmt: skip
    return rows


class _sdpa:
    """torch's attention on packed heads [T, n, d]: with a mask [T, T], or as a causal batch of equal sequences."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float, *, mask: Tensor | None = None, batch: int = 1
    ) -> None:
        def heads(x: Tensor) -> Tensor:
            split = x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()
            return (split if batch > 1 else split[0]).requires_grad_()

        self.q, self.k, self.v = heads(q), heads(k), heads(v)
        self._do, self._mask, self._scale = heads(do).detach(), mask, scale
        self._out = self._attend()

    def _attend(self) -> Tensor:
        q, k, v = (x if x.dim() == 4 else x[None] for x in (self.q, self.k, self.v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, self._mask, is_causal=self._mask is None, scale=self._scale, enable_gqa=True
        )
        return out if self.q.dim() == 4 else out[0]

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self._attend()

    def backward(self) -> None:
        """Of the attention computed when this was made."""
        self.q.grad = self.k.grad = self.v.grad = None
        self._out.backward(self._do, retain_graph=True)
