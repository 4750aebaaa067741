"""Tree attention: ours in a CUDA graph and from Python, FlexAttention on the same mask, torch's on dense copies."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness.markdown import table
from bench.harness.rows import Row
from bench.on_gpu.section import Bench, Job, Section, figure, relative_error, torch_version
from bench.on_gpu.show import TIMED, grouped, pick, us
from embedgrad.backends.triton import OPS as ours
from embedgrad.engine.tree import TokenTree, build_tree
from embedgrad.prompt.rendering import Rendered

Heads = tuple[int, int, int]
Shape = tuple[int, int, int]  # shared tokens, own tokens of a branch, branches
EACH = {"forward": 4, "backward": 10}  # operations for a visible pair, head and dimension, as FlashAttention counts
COMPILED = 2  # trees for which FlexAttention is compiled, which takes some 20 s each


def tree_of(shape: Shape) -> TokenTree:
    """Branches of random tokens behind `shared` ones."""
    shared, own, branches = max(shape[0], 1), shape[1], shape[2]
    draw = random.Random(1)
    prompt = [draw.randrange(100) for _ in range(shared)]
    sequences = [
        Rendered(
            [*prompt, 1000 + n, *(draw.randrange(100) for _ in range(own - 1))], [*range(shared)] + [-1] * own,
            [False] * (shared + own - 2) + [True] * 2, 0,
        )
        for n in range(branches)
    ]  # fmt: skip
    return build_tree(sequences)


class _Operands:
    """q, k, v, do [T, heads, D] on a tree, and our attention of them."""

    def __init__(self, bench: Bench, heads: Heads, shape: Shape) -> None:
        (h, g, d), device = heads, bench.device
        self.tree = tree_of(shape)
        self.mask = self.tree.mask()
        self.pairs = int(self.mask.visible().sum()) * h
        self.on_device = self.mask.moved(lambda x: x.to(device.where))
        tokens = self.tree.num_tokens
        self.q, self.k, self.v, self.do = (device.random(tokens, n, d) for n in (h, g, g, h))
        self.out, self.dq, self.dk, self.dv = (torch.empty_like(x) for x in (self.q, self.q, self.k, self.v))
        self.lse = device.empty(tokens, h, dtype=torch.float32)
        self.scale = d**-0.5

    def forward(self) -> object:
        return ours.tree_attention(self.q, self.k, self.v, self.on_device, scale=self.scale, out=self.out, lse=self.lse)

    def backward(self) -> None:
        ours.tree_attention_backward(
            self.do, self.q, self.k, self.v, self.out, self.lse, self.on_device, scale=self.scale, dq=self.dq,
            dk=self.dk, dv=self.dv,
        )  # fmt: skip

    def errors(self) -> list[float]:
        """Of out, dq, dk and dv, against torch in float32 with a dense mask."""
        leaves = [x.transpose(0, 1).float().requires_grad_() for x in (self.q, self.k, self.v)]
        seen = self.on_device.visible()
        out = _attended(*(x[None] for x in leaves), mask=seen, scale=self.scale)[0]
        grads = torch.autograd.grad(out, leaves, self.do.transpose(0, 1).float())
        found = (self.out, self.dq, self.dk, self.dv)
        return [relative_error(x.transpose(0, 1), y) for x, y in zip(found, (out.detach(), *grads), strict=True)]


def _attended(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float
) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)


def _case(heads: Heads, shape: Shape, way: str, **more: Any) -> dict[str, Any]:
    return {"shape": "/".join(map(str, shape)), "heads": f"{heads[0]}/{heads[1]}", "dim": heads[2], "pass": way, **more}


def _rows(
    contender: str, version: str, heads: Heads, shape: Shape, pairs: int, timed: dict[tuple[str, str], list[float]],
    **more: Any,
) -> list[Row]:  # fmt: skip
    """timed: seconds by pass and by how they were timed."""
    return [
        figure("attention", contender, seconds, _case(heads, shape, way, timed=timing), version=version,
               operations=EACH[way] * pairs * heads[2], **more)
        for (way, timing), seconds in timed.items()
    ]  # fmt: skip


def _ours(bench: Bench, heads: Heads, shape: Shape) -> list[Row]:
    on, device = _Operands(bench, heads, shape), bench.device
    on.forward()
    on.backward()
    errors = on.errors()
    if not max(errors) < 0.02:
        raise ValueError(f"our attention is wrong by {max(errors):.1e}")
    timed = {
        ("forward", "graph"): device.graph_seconds(on.forward),
        ("backward", "graph"): device.graph_seconds(on.backward),
        ("forward", "cold"): device.seconds(on.forward),
        ("backward", "cold"): device.seconds(on.backward),
    }
    return _rows("embedgrad", "triton", heads, shape, on.pairs, timed, errors=errors)


def _flex(bench: Bench, heads: Heads, shape: Shape) -> list[Row]:
    from torch._functorch import config as functorch_config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    on = _Operands(bench, heads, shape)
    begin, end, tokens = on.on_device.key_begin, on.on_device.key_end, on.tree.num_tokens

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= begin[j]) & (i < end[j])

    mask = create_block_mask(cast(Any, sees), None, None, tokens, tokens, device=str(bench.device.where))
    attend: Any = flex_attention if bench.device.interpreted else torch.compile(flex_attention)
    q, k, v, do = (x.transpose(0, 1)[None].contiguous() for x in (on.q, on.k, on.v, on.do))
    leaves = [x.requires_grad_(not bench.device.interpreted) for x in (q, k, v)]  # on a CPU it has no backward
    forward: Callable[[], Any] = lambda: attend(*leaves, block_mask=mask, scale=on.scale, enable_gqa=True)  # noqa: E731
    if bench.device.interpreted:
        timed = {("forward", "cold"): bench.device.seconds(forward)}
    else:
        with functorch_config.patch(donated_buffer=False):  # else its backward may run only once
            timed = _both(bench, forward, leaves, do)
    return _rows("FlexAttention, same mask", torch_version(), heads, shape, on.pairs, timed)


def _dense(bench: Bench, heads: Heads, shape: Shape, backend: str) -> list[Row]:
    """A causal batch in which every branch has its own copy of what is shared."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shared, own, branches = shape
    length, (h, _, d) = max(shared, 1) + own, heads
    leaves = [bench.device.random(branches, h, length, d).requires_grad_() for _ in range(3)]
    do = bench.device.random(branches, h, length, d)
    with sdpa_kernel([getattr(SDPBackend, backend)]):
        timed = _both(bench, lambda: _attended(*leaves, causal=True, scale=d**-0.5), leaves, do)
    pairs = branches * h * length * (length + 1) // 2
    name = f"torch {backend.removesuffix('_ATTENTION').lower()}, dense copies"
    return _rows(name, torch_version(), heads, shape, pairs, timed)


def _both(
    bench: Bench, forward: Callable[[], Any], leaves: list[Tensor], do: Tensor
) -> dict[tuple[str, str], list[float]]:
    out = forward()
    back = bench.device.seconds(lambda: torch.autograd.grad(out, leaves, do, retain_graph=True))
    return {("forward", "cold"): bench.device.seconds(forward), ("backward", "cold"): back}


def _jobs(bench: Bench) -> Iterator[Job]:
    every = [(heads, shape) for heads in bench.sizes.heads for shape in bench.sizes.trees]
    for heads, shape in every:
        yield Job(f"attention {shape}, {heads}", partial(_ours, bench, heads, shape), 1.5)
    dense = ("MATH",) if bench.device.interpreted else ("CUDNN_ATTENTION", "FLASH_ATTENTION")
    for heads, shape in every:
        for backend in dense:
            yield Job(f"{backend} {shape}, {heads}", partial(_dense, bench, heads, shape, backend), 1)
    for heads, shape in every[:COMPILED]:
        yield Job(f"FlexAttention {shape}, {heads}", partial(_flex, bench, heads, shape), 15)


def _table(rows: Sequence[Row]) -> str:
    names = [name for name in dict.fromkeys(one.contender for one in rows) if name != "embedgrad"]
    cells: list[Sequence[object]] = []
    for (case, at), found in grouped(rows, _asked).items():
        assert isinstance(case, tuple)
        shape, heads, dim = case
        for way in EACH:
            timed = [pick(found, "embedgrad", **{"pass": way, "timed": t}) for t in TIMED]
            best = next(filter(None, timed), None)
            rate = best.more["operations"] / best.median / 1e12 if best else None
            beside = (us(pick(found, name, **{"pass": way})) for name in names)
            cells.append(
                (shape, f"{heads} of {dim}", way, at, *map(us, timed), f"{rate:.0f}" if rate else None, *beside)
            )
    heads_ = ("shared/own/branches, µs", "heads", "", "commit", *TIMED.values(), "TFLOP/s", *names)
    return table(heads_, cells)


def _asked(one: Row) -> tuple[str, str, int]:
    return str(one.case["shape"]), str(one.case["heads"]), int(one.case["dim"])


SECTION = Section("attention", "How long is attention on a tree?", 75, _jobs, _table)
