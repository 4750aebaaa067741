"""The loss and its gradient at the hidden states, head included: ours, and what others have for it."""

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
from bench.on_gpu.show import grouped, ms, pick
from embedgrad.backends.triton import OPS as ours
from embedgrad.model.frozen import FrozenMatrix, Widening

Size = tuple[int, int, int]  # targets, vocabulary, width
CHECKED = 256  # rows that are compared with float32
AT_ONCE = 2048  # most rows whose logits torch is asked to hold
ROWS = 1024  # rows of each of the two products
CONTENDERS = {
    "two cuBLAS products": (), "torch": (), "Cut Cross-Entropy": ("cut_cross_entropy",), "Liger": ("liger_kernel",),
}  # fmt: skip


class _Operands:
    """h [N, d], W [V, d] and targets [N]."""

    def __init__(self, bench: Bench, size: Size) -> None:
        (n, v, d), device = size, bench.device
        self.h, self.weight = device.random(n, d), device.random(v, d, scale=0.05)
        self.targets = torch.randint(0, v, (n,), device=device.where)
        self.leaf = self.h.clone().requires_grad_()


def _measured(bench: Bench, contender: str, version: str, size: Size, run: Callable[[], Any], **more: Any) -> list[Row]:
    run()
    before = bench.device.peak_bytes(lambda: None)
    peak = bench.device.peak_bytes(run) - before
    case = {"targets": size[0], "vocabulary": size[1], "width": size[2]}
    seconds = bench.device.seconds(run, 0.3)
    return [figure("loss", contender, seconds, case, version=version, peak_bytes=max(peak, 0), **more)]


def _ours(bench: Bench, size: Size) -> list[Row]:
    on, (n, v, _), device = _Operands(bench, size), size, bench.device
    weights, dh = torch.full((n,), 1 / n, device=device.where), torch.empty_like(on.h)
    head = FrozenMatrix([on.weight], None, Widening(on.weight.dtype, device.where))
    workspace = device.empty(ours.linear_cross_entropy_bytes(n, v, on.h.dtype), dtype=torch.uint8)

    def run() -> tuple[Tensor, Tensor]:
        return ours.linear_cross_entropy(on.h, head, on.targets, weights, dh=dh, workspace=workspace)

    nll, _ = run()
    some = slice(0, CHECKED)
    leaf = on.h[some].float().requires_grad_()
    truth = F.cross_entropy(leaf @ on.weight.float().T, on.targets[some], reduction="none")
    (grad,) = torch.autograd.grad(truth.sum() / n, leaf)
    errors = [relative_error(nll[some], truth.detach()), relative_error(dh[some], grad)]
    if not max(errors) < 0.02:
        raise ValueError(f"our loss is wrong by {max(errors):.1e}")
    return _measured(bench, "embedgrad", OURS, size, run, errors=errors, workspace_bytes=workspace.nbytes)


def _other(bench: Bench, contender: str, size: Size) -> list[Row]:
    on = _Operands(bench, size)
    version = next((told for told in map(installed, CONTENDERS[contender]) if told), torch_version())
    return _measured(bench, contender, version, size, _way(contender, on))


def _way(contender: str, on: _Operands) -> Callable[[], Any]:
    leaf, weight, targets = on.leaf, on.weight, on.targets
    if contender == "two cuBLAS products":
        return lambda: [(rows @ weight.T) @ weight for rows in on.h.split(ROWS)]
    if contender == "torch":
        return lambda: torch.autograd.grad(F.cross_entropy((leaf @ weight.T).float(), targets), leaf)
    if contender == "Cut Cross-Entropy":
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if leaf.is_cuda else "torch_compile"
        return lambda: torch.autograd.grad(linear_cross_entropy(leaf, weight, targets, impl=impl), leaf)
    from liger_kernel.ops.fused_linear_cross_entropy import (  # type: ignore[import-not-found,unused-ignore]
        LigerFusedLinearCrossEntropyFunction,
    )

    def liger() -> Any:
        found = LigerFusedLinearCrossEntropyFunction.apply(leaf, weight, targets)
        return torch.autograd.grad(found[0] if isinstance(found, tuple) else found, leaf)

    return liger


def _jobs(bench: Bench) -> Iterator[Job]:
    for size in bench.sizes.losses:
        yield Job(f"loss {size}", partial(_ours, bench, size), 2)
    for size in bench.sizes.losses:
        for contender, needs in CONTENDERS.items():
            if contender == "torch" and size[0] > AT_ONCE:
                continue
            if contender == "Cut Cross-Entropy" and bench.device.interpreted:
                continue  # its kernels are Triton's, and its other way compiles for a minute
            yield Job(f"{contender} {size}", partial(_other, bench, contender, size), 3, needs=needs)


def _table(rows: Sequence[Row]) -> str:
    names = [name for name in CONTENDERS if any(one.contender == name for one in rows)]
    cells: list[Sequence[object]] = []
    for (size, at), found in grouped(rows, _asked).items():
        assert isinstance(size, tuple)
        told = f"{size[0]:,} of {size[1]:,}, width {size[2]:,}"
        cells.append((told, at, _cell(pick(found, "embedgrad")), *(_cell(pick(found, name)) for name in names)))
    return table(("ms (MiB that it needs)", "commit", "ours", *names), cells)


def _cell(one: Row | None) -> str | None:
    told = ms(one)
    return f"{told} ({one.peak_bytes / 2**20:,.0f})" if one is not None and one.peak_bytes else told


def _asked(one: Row) -> tuple[int, int, int]:
    return int(one.case["targets"]), int(one.case["vocabulary"]), int(one.case["width"])


SECTION = Section("loss", "How long are the loss and its gradient?", 40, _jobs, _table)
