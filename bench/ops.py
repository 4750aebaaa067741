"""How close does each operation come to what the machine allows, and how does it compare with torch's own?

SmolLM2-135M's sizes, in float32 and bfloat16, on two trees of `bench step` and one that no cache holds. Contenders are
every backend that runs here, torch's own way to the same result, and Cut Cross-Entropy's portable path where it is
installed. (Liger-Kernel imports on a CPU, but all of its operations are Triton kernels that need a GPU.) Each backend's
result is first compared with the reference in float64; a wrong one gives no figure.

A row-wise operation has two bounds, of which the longer one counts: a copy of the bytes that it must move, in the same
turn; and its vector instructions (`operations`) at the rate at which all threads multiply and add in registers. The
table also has the rate at which the machine copies 256 MiB. Small operations exceed that: they work in the cache. The
loss's bound is the time of its two matrix products in BLAS. Tree attention is compared with torch's
`scaled_dot_product_attention`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import embedgrad
from bench.harness.arguments import add_machine, positive
from bench.harness.clock import device, take_turns
from bench.harness.contenders import Case, tree_of
from bench.harness.markdown import seconds, table
from bench.harness.op_attention import Attention
from bench.harness.op_cases import OpCase, Run, cases, operations
from bench.harness.rows import Row, row
from embedgrad import backends
from embedgrad.backends.base import Backend
from embedgrad.backends.reference import OPS as reference
from embedgrad.engine.tree import TokenTree
from embedgrad.model.config import ModelConfig

CHECKS = ("tests/backends/test_native.py",)
SHAPES = ("64/64/8", "32/250/8", "4096/190/64")
ATTENTION_TOKENS = 4096  # of the largest tree for attention: torch's mask holds all pairs of tokens
COPIED = 128 << 20  # bytes read, and as many written, to measure the machine's rate
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    parser.add_argument(
        "--shapes", nargs="*", type=Case.told, default=None, help=f"prompt/query/batch (default: {' '.join(SHAPES)})"
    )
    parser.add_argument("--repeats", type=positive, default=9, help="timings of each (default 9)")
    add_machine(parser)


def main(args: argparse.Namespace) -> list[Row]:
    """Measure; the rows."""
    from embedgrad.tasks import smollm2

    where = device(args.device)
    torch.set_num_threads(args.threads)
    model = embedgrad.load_model(smollm2.path(), weights="stored", device="cpu")
    rows: list[Row] = []
    for shape in args.shapes or (SHAPES[:1] if args.quick else SHAPES):
        case = Case.parse(shape)
        tree = tree_of(model, case)
        rows += _Bench(args, where, case, tree, model.config).rows()
        print(f"{shape}: {tree.num_tokens} packed tokens done", flush=True)
    return rows


class _Bench:
    """All operations on one tree."""

    def __init__(
        self, args: argparse.Namespace, where: torch.device, case: Case, tree: TokenTree, config: ModelConfig
    ) -> None:
        self._args, self._where, self._case, self._tree, self._config = args, where, case, tree, config
        self._repeats = 5 if args.quick else args.repeats
        self._own: list[Backend] = [backends.choose("triton" if where.type == "cuda" else "native", where)]
        self._machine = _copied_per_second(where)

    def rows(self) -> list[Row]:
        found = []
        for name, dtype in TYPES.items():
            for one in cases(self._config, self._tree, dtype, self._where, self._own):
                found += list(self._row_wise(one, name, dtype))
        types = TYPES if self._where.type == "cuda" else {"float32": torch.float32}
        for name, dtype in types.items() if self._tree.num_tokens <= ATTENTION_TOKENS else ():
            found += list(self._attention(name, dtype))
        return found

    def _row(self, op: str, dtype: str, name: str, values: list[float], version: str = "", **more: Any) -> Row:
        own = name in ("native", "triton", "reference")
        case = {"op": op, "dtype": dtype, "shape": str(self._case), "tokens": self._tree.num_tokens,
                "threads": self._args.threads, "device": self._args.device}  # fmt: skip
        told = version or (f"embedgrad {embedgrad.__version__}" if own else f"torch {torch.__version__}")
        return row("ops", name, told, values, case=case, **more)

    def _row_wise(self, one: OpCase, dtype_name: str, dtype: torch.dtype) -> Iterator[Row]:
        _check(one.name, {name: one.contenders[name] for name in one.checked}, one.truth(), one.tolerance)
        source = torch.randn(one.numbers // 2, device=self._where).to(dtype)
        target = torch.empty_like(source)
        runs: list[Any] = [lambda: target.copy_(source), *one.contenders.values()]
        if one.products is not None:
            runs.append(one.products)
        copy, *times = take_turns(runs, self._repeats, self._where, warm=True)
        bounds = {"copy": statistics.median(copy)}
        if one.products is not None:
            bounds = {"products": statistics.median(times.pop())}
        elif self._where.type == "cpu":
            bounds["arithmetic"] = operations(one.name, dtype) * one.out * _multiply_add_seconds()
        which = max(bounds, key=lambda name: bounds[name])
        for name, values in zip(one.contenders, times, strict=True):
            yield self._row(
                one.name, dtype_name, name, values, one.versions.get(name, ""), bytes=dtype.itemsize * one.numbers,
                bound=which, bound_seconds=bounds[which], of_bound=bounds[which] / statistics.median(values),
                copy_seconds=statistics.median(copy), machine_copy=self._machine,
            )  # fmt: skip

    def _attention(self, dtype_name: str, dtype: torch.dtype) -> Iterator[Row]:
        given = Attention(self._config, self._tree, self._case, self._where, dtype, [*self._own, reference])
        truths = given.truth()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for name, runs, truth, each in (
            ("tree_attention", given.forward, truths[0], 4),
            ("tree_attention_backward", given.backward, truths[1], 8),
        ):
            _check(name, {n: run for n, run in runs.items() if not n.startswith("torch")}, truth, tolerance)
            times = take_turns(list(runs.values()), self._repeats, self._where, warm=True)
            for contender, values in zip(runs, times, strict=True):
                yield self._row(
                    name, dtype_name, contender, values, operations=each * given.pairs * self._config.head_dim
                )


def _check(name: str, runs: dict[str, Run], truth: list[Tensor], tolerance: float) -> None:
    for contender, run in runs.items():
        for found, true in zip(run(), truth, strict=True):
            error = float((found.double() - true).norm() / true.norm())
            if not error <= tolerance:
                raise SystemExit(f"{contender}'s {name} is wrong by {error:.1e}: no figure.")


def _multiply_add_seconds() -> float:
    """Seconds of one multiply-add of one number in registers, all of torch's threads together."""
    found = []
    for _ in range(5):
        started = time.perf_counter()
        count = torch.ops.embedgrad.multiply_adds(200_000)
        found.append((time.perf_counter() - started) / count)
    return statistics.median(found)


def _copied_per_second(where: torch.device) -> float:
    """Bytes read and written per second when one large buffer is copied to another."""
    source = torch.ones(COPIED // 4, device=where)
    target = torch.empty_like(source)
    return 2 * COPIED / statistics.median(take_turns([lambda: target.copy_(source)], 5, where)[0])


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _named(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """(operation, type, shape) → contender → row."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for one in rows:
        key = (str(one.case["op"]), str(one.case["dtype"]), str(one.case["shape"]))
        found.setdefault(key, {})[one.contender] = one
    return found


def _best(named: dict[str, Row]) -> Row:
    """Our row of the backend that a user gets."""
    return named.get("native") or named.get("triton") or named["reference"]


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`ops`: row-wise operations; `ops-attention`."""
    row_wise: list[Sequence[object]] = []
    attention: list[Sequence[object]] = []
    for (op, dtype, shape), named in _named(rows).items():
        ours = _best(named)
        others = [r for r in named.values() if not r.version.startswith("embedgrad")]
        if op.startswith("tree_attention"):
            rate = ours.more["operations"] / ours.median / 1e9
            fastest = min(r.median for r in others)
            beside = ("reference", "torch, masked", "torch, dense")
            cells = [seconds(named[n].median) if n in named else None for n in beside]
            attention.append((op, shape, seconds(ours.median), f"{rate:.0f}", *cells, f"{fastest / ours.median:.2f}×"))
            continue
        rate = ours.more["bytes"] / ours.median / 1e9
        cut = named.get("cut-cross-entropy")
        row_wise.append((
            op, dtype, shape, seconds(ours.median), f"{rate:.1f}",
            f"{ours.more['of_bound']:.0%} of {ours.more['bound']}", f"{rate * 1e9 / ours.more['machine_copy']:.0%}",
            *(f"{named[n].median / ours.median:.2f}×" if n in named else None for n in ("reference", "torch")),
            f"{cut.median / ours.median:.2f}×" if cut else None,
        ))  # fmt: skip
    heads = ("operation", "stored in", "prompt/query/batch", "time", "GB/s", "of its bound",
             "of the machine's copy", "reference's time", "torch's time", "cut-cross-entropy's")  # fmt: skip
    names = ("operation", "prompt/query/batch", "time", "GFLOP/s", "reference", "torch, masked", "torch, dense",
             "torch's best over ours")  # fmt: skip
    return {"ops": table(heads, row_wise), "ops-attention": table(names, attention)}


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """Share of the bound for every row-wise operation, float32."""
    import matplotlib.pyplot as plt

    from bench.harness import pictures as draw

    float32 = {key: named for key, named in _named(rows).items() if key[1] == "float32"}
    found = {key: named for key, named in float32.items() if "of_bound" in _best(named).more}
    ops, shapes = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 2))
    figure, axes = plt.subplots(figsize=(8, 3.8))
    series = [
        (shape, draw.THREE[place % 3], [100 * _best(found[op, "float32", shape]).more["of_bound"] for op in ops])
        for place, shape in enumerate(shapes)
    ]
    draw.grouped_bars(axes, series)
    axes.axhline(70, color=draw.LIMIT, linestyle="--", label="70 %")
    axes.set_xticks(range(len(ops)), ops, rotation=40, ha="right", fontsize=8)
    axes.set_ylabel("% of the bound (bytes, arithmetic\nor products, whichever binds)")
    axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return {"ops": figure}
