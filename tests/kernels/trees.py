"""Token trees for the attention tests: drawn masks, and attention over them written as plainly as can be."""

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from embedgrad.kernels.tree_schedule import TreeSchedule
from hypothesis import strategies as st
from torch import Tensor

from .harness import DEVICE, INTERPRETED


@contextmanager
def quick_device_functions() -> Iterator[None]:
    """The interpreter patches triton.language anew whenever one device function calls another, most of its time; inside
    this, it does so once per launch for our functions and once for those of Triton's own library.
    """
    if not INTERPRETED:
        yield
        return
    from triton.language import standard
    from triton.runtime import interpreter

    device_call, launch = interpreter.InterpretedFunction.__call__, interpreter.GridExecutor.__call__
    patched = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        library = self.fn.__globals__ is standard.__dict__
        if library and "library" not in patched:
            patched.add("library")
            return device_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    def start(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    with (
        mock.patch.object(interpreter.InterpretedFunction, "__call__", call),
        mock.patch.object(interpreter.GridExecutor, "__call__", start),
    ):
        yield


@dataclass(frozen=True)
class Tree:
    """One drawn mask. Parent and length per segment, depth first; prefix: (begin, end) of each of its keys."""

    name: str
    segments: tuple[tuple[int, int], ...]
    prefix: tuple[tuple[int, int], ...]
    every: int  # one of how many tokens is a query
    window: int | None

    @property
    def tokens(self) -> int:
        return sum(length for _, length in self.segments)

    def schedule(self) -> TreeSchedule:
        begin, end, position = _packed(self.segments)
        prefix_begin = [min(b, self.tokens) for b, _ in self.prefix]
        prefix_end = [min(e, self.tokens) for _, e in self.prefix]
        query = list(range(self.every - 1, self.tokens, self.every))
        behind = [p + len(self.prefix) for p in position]
        return TreeSchedule(
            _ints(prefix_begin + begin),
            _ints(prefix_end + end),
            _ints(query),
            len(self.prefix),
            _ints([behind[i] for i in query]),
            _ints([*range(len(self.prefix)), *behind]),
            self.window,
        )


def _ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=DEVICE)


def _packed(segments: Sequence[tuple[int, int]]) -> tuple[list[int], list[int], list[int]]:
    """key_begin, key_end and position of every token of segments (parent, length), packed depth first."""
    starts, stops, positions = [0] * len(segments), [0] * len(segments), [0] * len(segments)
    at = 0

    def pack(i: int) -> None:
        nonlocal at
        parent, length = segments[i]
        positions[i] = positions[parent] + segments[parent][1] if parent >= 0 else 0
        starts[i] = at
        at += length
        for child, (of, _) in enumerate(segments):
            if of == i:
                pack(child)
        stops[i] = at

    for i, (parent, _) in enumerate(segments):
        if parent < 0:
            pack(i)
    begin, end, position = [0] * at, [0] * at, [0] * at
    for i, (_, length) in enumerate(segments):
        for j in range(length):
            begin[starts[i] + j], end[starts[i] + j], position[starts[i] + j] = (
                starts[i] + j,
                stops[i],
                positions[i] + j,
            )
    return begin, end, position


def _shape(kind: str, sizes: list[int], parents: list[int]) -> tuple[tuple[int, int], ...]:
    if kind == "one token":
        return ((-1, 1),)
    if kind == "prefix":
        return ((-1, 20 + sizes[0]), *((0, n) for n in sizes[1:3]))
    if kind == "leaves":
        return ((-1, sizes[0]), *((0, 1 + n % 3) for n in sizes * 2))
    if kind == "deep":
        return tuple((i - 1, 1 + n % 4) for i, n in enumerate(sizes * 2))
    if kind == "forest":
        return tuple((-1, n) for n in sizes)
    return tuple((-1 if i == 0 else parents[i] % (i + 1) - 1, n) for i, n in enumerate(sizes))


@st.composite
def trees(draw: st.DrawFn, *, windows: bool = True) -> Tree:
    """Trees of 1 to about 50 tokens: random ones, and the kinds that go wrong; some segments are empty."""
    kind = draw(st.sampled_from(("random", "prefix", "leaves", "deep", "forest", "one token")))
    sizes = draw(st.lists(st.integers(0, 9), min_size=4, max_size=6))
    sizes[0] = max(sizes[0], 1)
    parents = draw(st.lists(st.integers(0, 5), min_size=6, max_size=6))
    bounds = st.tuples(st.integers(0, 40), st.integers(0, 40))
    prefix = draw(st.lists(bounds, max_size=5))
    every = draw(st.sampled_from((1, 1, 3)))
    window = draw(st.sampled_from((None, None, 1, 7))) if windows else None
    return Tree(kind, _shape(kind, sizes, parents), tuple(prefix), every, window)


def seen(schedule: TreeSchedule) -> Tensor:
    """[Nq, S] which query sees which key, written from the definition."""
    i = schedule.query_index[:, None]
    visible = (schedule.key_begin[None, :] <= i) & (i < schedule.key_end[None, :])
    if schedule.window is not None:
        assert schedule.query_position is not None
        assert schedule.key_position is not None
        visible &= schedule.query_position[:, None] - schedule.key_position[None, :] < schedule.window
    return visible


def dense(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """(o [Nq, H, D], lse [Nq, H]) in the type of q throughout, one matrix of logits per head. visible: [Nq, S]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible, float("-inf"))
    lse = s.logsumexp(-1)
    p = torch.where(visible, (s - torch.where(lse == float("-inf"), 0, lse)[..., None]).exp(), 0)
    return torch.einsum("hij,jhd->ihd", p, v), lse.T


def dense_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `dense` by autograd, in the type of q; dk and dv for all S keys."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    o, _ = dense(q, k, v, visible, scale, softcap)
    if not o.numel() or not visible.any():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    return torch.autograd.grad(o, (q, k, v), do)


def magnitudes(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What dq, dk and dv would be if nothing cancelled: σ Σ P (|dP| + |D|) |k| and so on. Rounding errors are
    relative to these; dS = P (dP − D) itself may vanish (it does where a query sees one key).
    """
    group = q.shape[1] // k.shape[1]
    o, lse = dense(q, k, v, visible, scale, softcap)
    wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = torch.einsum("ihd,jhd->hij", q, wide_k) * scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    finite = lse.masked_fill(lse == float("-inf"), 0).T
    p = torch.where(visible, (s - finite[..., None]).exp(), 0)
    dp = torch.einsum("ihd,jhd->hij", do, wide_v).abs() + (do * o).abs().sum(-1).T[..., None]
    dq = torch.einsum("hij,jhd->ihd", p * dp, wide_k.abs()) * scale
    dk = torch.einsum("hij,ihd->jhd", p * dp, q.abs()) * scale
    dv = torch.einsum("hij,ihd->jhd", p, do.abs())
    return dq, dk.unflatten(1, (-1, group)).sum(2), dv.unflatten(1, (-1, group)).sum(2)


def loaded_from(module: ModuleType, source: str) -> ModuleType:
    """A kernel module from other source text; from a file, because Triton reads a kernel's text there again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{module.__name__.rsplit('.', 1)[-1]}_faulty.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"{module.__package__}.{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        faulty = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(faulty)
    return faulty
