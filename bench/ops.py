"""How close does each native operation come to what the machine allows, and tree attention to torch's own attention?

SmolLM2-135M's sizes and the trees of `bench step`. Every operation is first held against the reference in float64; one
that is wrong gives no figure. A row-wise operation has two bounds, of which the longer one counts: a copy of as many
bytes as it must move, in the same turn; and its operations (`OPERATIONS` for each number) at the rate at which the
threads multiply and add in registers, measured beside it. Tree attention (forward, backward) is measured against
`scaled_dot_product_attention` given the same tree in the two ways it could be: as a mask over the packed tokens, and as
a dense causal batch that repeats the prompt per query; the faster one counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.step import SHAPES, TARGETS, _task
from embedgrad.backends import native, reference
from embedgrad.model.config import ModelConfig
from embedgrad.rendering import render
from embedgrad.tree import TokenTree, build_tree
from embedgrad.trust_region import CosineCone

Timed = Callable[[], Any]
TYPES = (torch.float32, torch.bfloat16)


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
        found = [row for dtype in TYPES for row in _row_wise(model.config, tree, dtype, repeats)]
        found += _attention(model.config, tree, shape, repeats)
        rows += [{"question": "ops", "shape": shape, "threads": args.threads, **row} for row in found]
        _print(shape, tree.num_tokens, found)
    return rows


def _print(shape: str, tokens: int, rows: list[dict[str, Any]]) -> None:
    print(f"\nprompt/query/batch {shape}: {tokens} packed tokens")
    for row in rows:
        if "bytes" in row:
            print(
                f"{row['op']:<18} {row['type']:<9} {row['seconds'] * 1e6:8.0f} us "
                f"{row['bytes'] / row['seconds'] / 1e9:6.1f} GB/s; copy {row['copy_seconds'] * 1e6:.0f} us, "
                f"arithmetic {row['arithmetic_seconds'] * 1e6:.0f} us: {row['of_bound']:.0%} of the bound"
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


# Instructions of arithmetic that the kernels of csrc/cpu/ spend on each number that comes out: a fused multiply-add, a
# comparison, a division, a root or a shift counts as one (exp: 12). Behind them how many numbers are loaded and stored
# for it: in bfloat16 a load takes 2 more (extend, shift), a store 9 (round to even, keep NaN, pack).
OPERATIONS = {
    "rms_norm": (3, 2.25, 1),  # x² summed; x r w (four rows share a load of w)
    "add_rms_norm": (4, 4.25, 2),
    "rms_norm_backward": (6, 5.5, 1),  # w dy, w dy x summed, x² summed; dx − x b, w dy, + w dy r
    "rope": (2, 1, 1),
    "rope_backward": (2, 1, 1),
    "swiglu": (19, 2, 1),  # 1 + exp(−g) and its limits: 17; g u / that
    "swiglu_backward": (26, 3, 2),
    "softmax_loss": (18, 0, 0),  # largest; z − top, exp and its limit, sum; scaled
    "embed": (0, 0, 0),
    "embed_backward": (1, 1, 0),
    "prompt_step": (24, 0, 0),  # AdamW 10; 3 sums in float64 at half the rate and their conversions
}
NARROW_LOAD, NARROW_STORE = 2, 9


def _operations(name: str, dtype: torch.dtype) -> float:
    operations, loads, stores = OPERATIONS[name]
    return operations + (NARROW_LOAD * loads + NARROW_STORE * stores if dtype == torch.bfloat16 else 0)


def _multiply_adds() -> float:
    """Seconds that one multiply-add of one number takes, on all of torch's threads together, in registers."""
    rounds = 200_000
    found = []
    for _ in range(5):
        started = time.perf_counter()
        count = torch.ops.embedgrad.multiply_adds(rounds)
        found.append((time.perf_counter() - started) / count)
    return statistics.median(found)


@dataclass
class _Case:
    """An operation: `run` it; `numbers` that it must move, and that come out; results and what they should be."""

    run: Timed
    numbers: float
    out: int
    checked: Callable[[], list[Tensor]]
    truth: Callable[[], list[Tensor]]


def _row_wise(config: ModelConfig, tree: TokenTree, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    cases = _cases(config, tree, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    rows = []
    for name, case in cases.items():
        for found, truth in zip(case.checked(), case.truth(), strict=True):
            _check(name, found, truth, tolerance)
        source = torch.randn(int(case.numbers) // 2).to(dtype)
        target = torch.empty_like(source)
        seconds, copy = _times(repeats, case.run, lambda target=target, source=source: target.copy_(source))  # type: ignore[misc]
        arithmetic = _operations(name, dtype) * case.out * _multiply_adds()
        rows.append({
            "op": name, "type": str(dtype).removeprefix("torch."), "bytes": dtype.itemsize * case.numbers,
            "operations": _operations(name, dtype), "seconds": seconds, "copy_seconds": copy,
            "arithmetic_seconds": arithmetic, "of_copy": copy / seconds,
            "of_bound": max(copy, arithmetic) / seconds,
        })  # fmt: skip
    return rows


def _cases(config: ModelConfig, tree: TokenTree, dtype: torch.dtype) -> dict[str, _Case]:
    d, f, heads = config.hidden_size, config.intermediate_size, (config.num_heads, config.num_kv_heads, config.head_dim)
    tokens, targets, eps = tree.num_tokens, len(tree.target_ids), config.rms_eps

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    x, dy, w, into = random(tokens, d), random(tokens, d), random(d), random(tokens, d)
    gate_up, da, qkv = random(tokens, 2 * f), random(tokens, f), random(tokens, (heads[0] + 2 * heads[1]) * heads[2])
    angles = torch.rand(tokens, heads[2] // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    rotated = (heads[0] + heads[1]) * heads[2]
    act, wide = torch.empty_like(da), torch.empty_like(gate_up)

    def case(
        name: str, numbers: int, count: int, /, *inputs: Any, changed: int | None = None, **outputs: Tensor
    ) -> _Case:
        """count: numbers that come out; changed: the input that is also an output."""

        def call(backend: Any, convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
            given = [convert(i) if isinstance(i, Tensor) else i for i in inputs]
            taken = {key: convert(value) for key, value in outputs.items()}
            getattr(backend, name)(*given, **taken)
            return [*taken.values(), *([] if changed is None else [given[changed]])]

        return _Case(
            lambda: getattr(native, name)(*inputs, **outputs), numbers, count,
            lambda: call(native, Tensor.clone),
            lambda: call(reference, lambda t: t.double() if t.is_floating_point() else t),
        )  # fmt: skip

    n, moved = x.numel(), 2 * tokens * rotated + 2 * cos.numel()
    cases = {
        "rms_norm": case("rms_norm", 2 * n, n, x, w, eps, out=into),
        "add_rms_norm": case("add_rms_norm", 4 * n, n, x.clone(), dy, w, eps, out=into, changed=0),
        "rms_norm_backward": case("rms_norm_backward", 4 * n, n, dy, x, w, eps, dx=into),
        "rope": case("rope", moved, tokens * rotated, qkv.clone(), cos, sin, heads, changed=0),
        "rope_backward": case(
            "rope_backward", moved, tokens * rotated, qkv.clone(), None, cos, sin, heads, changed=0
        ),
        "swiglu": case("swiglu", 3 * tokens * f, tokens * f, gate_up, out=act),
        "swiglu_backward": case("swiglu_backward", 5 * tokens * f, tokens * f, da, gate_up, out=wide),
    }  # fmt: skip
    prompt, table = torch.randn(len(tree.prompt_positions), d), random(config.vocab_size, d)
    cases["embed"] = case("embed", 2 * n, n, prompt, table, tree.ids, tree.prompt_rows, out=into)
    grad = torch.empty_like(prompt)
    shown = tree.prompt_rows[tree.prompt_positions]
    at_shown = dy[tree.prompt_positions].contiguous()
    cases["embed_backward"] = case("embed_backward", 2 * at_shown.numel(), grad.numel(), at_shown, shown, grad=grad)
    if dtype == torch.float32:
        cases["softmax_loss"] = _softmax_loss(random(targets, config.vocab_size), tree.target_ids)
        cases["prompt_step"] = _prompt_step(len(prompt), d)
    return cases


def _softmax_loss(z: Tensor, targets: Tensor) -> _Case:
    count, weights, again = len(z), torch.ones(len(z)), z.clone()
    nll, predicted = torch.empty(count), torch.empty(count, dtype=torch.int64)

    def run() -> Tensor:
        torch.ops.embedgrad.softmax_loss(again, targets, weights, nll, predicted)
        return nll

    def truth() -> list[Tensor]:
        wide = z.double().requires_grad_()
        loss = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
        loss.sum().backward()
        assert wide.grad is not None
        return [loss.detach(), wide.grad]

    return _Case(run, 2 * z.numel(), z.numel(), lambda: [run().clone(), again.clone()], truth)


def _prompt_step(k: int, d: int) -> _Case:
    e0, g = torch.randn(k, d), torch.randn(k, d)
    e, m, v = e0 + 0.1 * torch.randn(k, d), torch.zeros(k, d), torch.zeros(k, d)

    def step(backend: Any, tensors: list[Tensor]) -> list[Tensor]:
        backend.prompt_step(*tensors, step=1, lr=1e-3, region=CosineCone(0.95))
        return [tensors[0], tensors[2], tensors[3]]

    return _Case(
        lambda: step(native, [e, e0, m, v, g]), 8 * k * d, k * d,
        lambda: step(native, [t.clone() for t in (e, e0, m, v, g)]),
        lambda: step(reference, [t.double() for t in (e, e0, m, v, g)]),
    )  # fmt: skip


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
