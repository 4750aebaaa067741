"""Operations that are bound by memory, beside a copy of as many bytes and what others have; and the small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness.markdown import table
from bench.harness.rows import Row
from bench.on_gpu.section import OURS, Bench, Job, Section, figure, installed, relative_error, torch_version
from bench.on_gpu.show import TIMED, grouped, pick, us
from embedgrad.backends.triton import OPS as ours
from embedgrad.maths.optimizer import ADAMW
from embedgrad.maths.trust_region import CosineCone

EPS = 1e-6
COPY = "a copy of as many bytes"
LIGER = ("liger_kernel",)
OTHERS_TOKENS = 4096  # tokens at which Liger and torch.compile are asked
PREFIX, OWN = 512, 256  # keys of decode attention: shared, and of each sequence
Run = Callable[[], Any]
Width = tuple[int, int, tuple[int, int, int]]  # width, feed-forward width, heads


def _cases(bench: Bench, tokens: int, sizes: Width) -> dict[str, tuple[int, Run]]:
    """Bytes that each operation must move, and the operation."""
    (d, f, (h, g, size)), device = sizes, bench.device
    x, dy, dx, out, weight = (*(device.random(tokens, d) for _ in range(4)), device.random(d))
    gate_up, da, act = device.random(tokens, 2 * f), device.random(tokens, f), device.empty(tokens, f)
    both, qkv = torch.empty_like(gate_up), device.random(tokens, (h + 2 * g) * size)
    angles = torch.rand(tokens, size // 2, device=device.where)
    cos, sin = angles.cos().to(device.dtype), angles.sin().to(device.dtype)
    each = x.itemsize
    return {
        "rms_norm": (2 * tokens * d * each, lambda: ours.rms_norm(x, weight, EPS, out=out)),
        "rms_norm_backward": (4 * tokens * d * each, lambda: ours.rms_norm_backward(dy, x, weight, EPS, dx=dx)),
        "rope": (2 * tokens * (h + g) * size * each, lambda: ours.rope(qkv, cos, sin, (h, g, size))),
        "swiglu": (3 * tokens * f * each, lambda: ours.swiglu(gate_up, out=act)),
        "swiglu_backward": (5 * tokens * f * each, lambda: ours.swiglu_backward(da, gate_up, out=both)),
    }


def _rows(bench: Bench, tokens: int, sizes: Width) -> list[Row]:
    found = []
    for op, (nbytes, run) in _cases(bench, tokens, sizes).items():
        source = bench.device.empty(max(nbytes // 2, 1), dtype=torch.uint8)
        target = torch.empty_like(source)
        case = {"op": op, "tokens": tokens, "width": sizes[0]}
        copied = bench.device.seconds(lambda: target.copy_(source))  # noqa: B023
        found.append(figure("row-wise", COPY, copied, case, version=torch_version()))
        found.append(figure("row-wise", "embedgrad", bench.device.seconds(run), case, version=OURS, bytes=nbytes))
    return found


def _compiled(bench: Bench, tokens: int, sizes: Width) -> list[Row]:
    d, f, _ = sizes
    x, weight, gate_up = bench.device.random(tokens, d), bench.device.random(d), bench.device.random(tokens, 2 * f)

    def activate(z: Tensor) -> Tensor:
        return F.silu(z[:, :f]) * z[:, f:]

    ways = {
        "rms_norm": (torch.compile(lambda z: F.rms_norm(z, (d,), weight, EPS)), x),
        "swiglu": (torch.compile(activate), gate_up),
    }
    return [
        figure("row-wise", "torch.compile", bench.device.seconds(partial(way, given)),
               {"op": op, "tokens": tokens, "width": d}, version=torch_version())
        for op, (way, given) in ways.items()
    ]  # fmt: skip


def _liger(bench: Bench, tokens: int, sizes: Width) -> list[Row]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # type: ignore[import-not-found,unused-ignore]
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found,unused-ignore]

    d, f, _ = sizes
    x, weight = bench.device.random(tokens, d), bench.device.random(d)
    gate, up = bench.device.random(tokens, f), bench.device.random(tokens, f)
    ways: dict[str, Run] = {
        "rms_norm": lambda: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False),
        "swiglu": lambda: LigerSiLUMulFunction.apply(gate, up),
    }
    version = installed("liger-kernel") or ""
    return [
        figure("row-wise", "Liger", bench.device.seconds(way), {"op": op, "tokens": tokens, "width": d},
               version=version)
        for op, way in ways.items()
    ]  # fmt: skip


def _row_jobs(bench: Bench) -> Iterator[Job]:
    every = [(tokens, sizes) for tokens in bench.sizes.tokens for sizes in bench.sizes.widths]
    for tokens, sizes in every:
        yield Job(f"row-wise {tokens} × {sizes[0]}", partial(_rows, bench, tokens, sizes), 2)
    if not bench.device.interpreted:  # Liger's kernels need a GPU, and to compile takes a minute
        yield Job("Liger", partial(_liger, bench, OTHERS_TOKENS, bench.sizes.widths[0]), 4, needs=LIGER)
        yield Job("torch.compile", partial(_compiled, bench, OTHERS_TOKENS, bench.sizes.widths[0]), 15)


def _row_table(rows: Sequence[Row]) -> str:
    cells: list[Sequence[object]] = []
    for (case, at), found in grouped(rows, _asked).items():
        assert isinstance(case, tuple)
        mine, copy = pick(found, "embedgrad"), pick(found, COPY)
        rate = f"{mine.more['bytes'] / mine.median / 1e9:,.0f}" if mine and mine.more.get("bytes") else None
        share = f"{copy.median / mine.median:.0%}" if mine and copy else None
        others = (us(pick(found, name)) for name in ("Liger", "torch.compile"))
        cells.append((case[0], f"{case[1]:,} × {case[2]:,}", at, us(mine), rate, share, *others))
    heads = ("operation, µs", "tokens × width", "commit", "ours", "GB/s", "of a copy's rate")
    return table((*heads, "Liger", "`torch.compile`"), cells)


def _asked(one: Row) -> tuple[str, int, int]:
    return str(one.case["op"]), int(one.case["tokens"]), int(one.case["width"])


# ---- what is bound by the time of a launch ---------------------------------------------------------------------------


def _prompt_step(bench: Bench, k: int, d: int) -> list[Row]:
    device, where = bench.device, bench.device.where
    e0, g, m, v = (torch.randn(k, d, device=where) for _ in range(4))
    e, v = e0.clone(), v.abs()
    alive, before = torch.ones((), dtype=torch.bool, device=where), torch.empty(3, k, d, device=where)
    factors, region = ADAMW.factors(1, 1e-3).to(where), CosineCone(0.95)

    def run() -> object:
        return ours.prompt_step(e, e0, m, v, g, factors=factors, region=region, alive=alive, before=before)

    leaf = torch.nn.Parameter(e0.clone())
    leaf.grad = g
    adamw = torch.optim.AdamW([leaf], lr=1e-3, weight_decay=0.0, fused=not device.interpreted)
    case = {"op": "prompt_step", "size": f"{k} × {d}"}
    return [
        *_timed(bench, "embedgrad", OURS, case, run),
        figure("small", "torch's fused AdamW, no projection", device.seconds(adamw.step), {**case, "timed": "cold"},
               version=torch_version()),
    ]  # fmt: skip


def _decode_attention(bench: Bench, count: int) -> list[Row]:
    (h, g, d), device = bench.sizes.heads[0], bench.device
    prefix, own = (6, 5) if device.interpreted else (PREFIX, OWN)
    q, out = device.random(count, h, d), device.empty(count, h, d)
    shared_k, shared_v = device.random(prefix, g, d), device.random(prefix, g, d)
    own_k, own_v = device.random(count, own, g, d), device.random(count, own, g, d)
    lengths = torch.full((count,), own, dtype=torch.int64, device=device.where)

    def run() -> object:
        return ours.decode_attention(q, shared_k, shared_v, own_k, own_v, lengths, scale=d**-0.5, out=out)

    keys, values = (
        torch.cat([x.expand(count, -1, -1, -1), y], 1).transpose(1, 2)
        for x, y in ((shared_k, own_k), (shared_v, own_v))
    )

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, scale=d**-0.5, enable_gqa=True)

    run()
    error = relative_error(out, plain()[:, :, 0])
    if not error < 0.02:
        raise ValueError(f"our decode attention is wrong by {error:.1e}")
    case = {"op": "decode_attention", "size": f"{count} × ({prefix} + {own}) keys"}
    return [
        *_timed(bench, "embedgrad", OURS, case, run, error=error),
        *_timed(bench, "torch's attention on copies", torch_version(), case, plain),
    ]


def _timed(bench: Bench, contender: str, version: str, case: dict[str, Any], run: Run, **more: Any) -> list[Row]:
    ways = {"graph": bench.device.graph_seconds, "cold": bench.device.seconds}
    return [
        figure("small", contender, clock(run), {**case, "timed": way}, version=version, **more)
        for way, clock in ways.items()
    ]


def _small_jobs(bench: Bench) -> Iterator[Job]:
    for k, d in bench.sizes.prompts:
        yield Job(f"prompt_step {k} × {d}", partial(_prompt_step, bench, k, d), 1)
    for count in bench.sizes.decoding:
        yield Job(f"decode_attention {count}", partial(_decode_attention, bench, count), 1)


def _small_table(rows: Sequence[Row]) -> str:
    cells: list[Sequence[object]] = []
    for (case, at), found in grouped(rows, lambda r: (str(r.case["op"]), str(r.case["size"]))).items():
        assert isinstance(case, tuple)
        for name in dict.fromkeys(one.contender for one in found):
            cells.append((*case, at, name, *(us(pick(found, name, timed=way)) for way in TIMED)))
    return table(("operation, µs", "size", "commit", "", *TIMED.values()), cells)


SECTION = Section("row-wise", "How close do row-wise operations come to a copy?", 30, _row_jobs, _row_table)
SMALL = Section("small", "How long are the operations that a launch bounds?", 15, _small_jobs, _small_table)
