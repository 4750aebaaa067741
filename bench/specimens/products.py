"""Specimens of the kernels around frozen matrices: cross entropy over the vocabulary, quantised products."""

from collections.abc import Callable

import torch
from embedgrad.kernels.linear_cross_entropy import linear_cross_entropy
from torch import Tensor

from bench.capture import Launch
from embedgrad.backends import reference

from . import Cost, Specimen, Tensors, Trial
from .shapes import MODELS, TARGETS, TYPES, Model, poisoned, size, untouched, values


def _cross_entropy_cost(m: Model, dtype: torch.dtype, gradient: bool, launches: list[Launch]) -> Cost:
    walk = launches[0]
    rows_per, tile = walk.blocks["BLOCK_N"], walk.blocks["BLOCK_V"]
    row_blocks, splits = walk.grid[:2]
    n, d, v = TARGETS, m.width, m.vocabulary
    least = size((n * d * (2 if gradient else 1) + v * d, dtype), (2 * n, torch.float32), (2 * n, torch.int64))
    tiles = row_blocks * -(-v // tile)
    read = tiles * ((tile + rows_per) * d + (tile * d if gradient else 0)) * dtype.itemsize
    sums = (2 * tiles * rows_per + splits * n) * d * 4 if gradient else 0
    products = 2 if gradient else 1
    return Cost(
        least=least,
        moved=read + sums + splits * n * 20 + (least if gradient else 0),
        useful=2 * products * n * d * v,
        done=2 * products * tiles * rows_per * tile * d,
    )


def _cross_entropy(m: Model, dtype: torch.dtype, gradient: bool) -> Specimen:
    h, dh = (untouched(TARGETS, m.width, dtype=dtype) for _ in range(2))
    head = untouched(m.vocabulary, m.width, dtype=dtype)
    targets, weights = torch.zeros(TARGETS, dtype=torch.int64), torch.ones(TARGETS)

    def run() -> None:
        linear_cross_entropy(h, head, targets, weights, dh=dh if gradient else None)

    return Specimen(
        "linear_cross_entropy" + ("+dh" if gradient else ""), m.name, dtype, run,
        lambda a: _cross_entropy_cost(m, dtype, gradient, a), matrix=True, kernels=("linear_cross_entropy_kernel",),
    )  # fmt: skip


def specimens() -> list[Specimen]:
    """Loss alone and with its gradient, and both directions of a quantised product, at both models' sizes."""
    return [_cross_entropy(m, dtype, gradient) for m in MODELS for dtype in TYPES for gradient in (True, False)]


class _Matrix:
    """The head as the reference backend takes it."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.shape = (int(weight.shape[0]), int(weight.shape[1]))

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        return out.copy_(x @ self.weight.T)

    def backward(self, dy: Tensor, out: Tensor) -> Tensor:
        return out.copy_(dy @ self.weight)


def _cross_entropy_trial(
    n: int, d: int, v: int, gradient: bool, softcap: float | None = None, scale: float = 1.0
) -> Trial:
    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        targets = torch.randint(-1, v, (n,), generator=g)
        head = values(g, v, d, scale=scale * d**-0.5)
        return {"h": values(g, n, d), "head": head, "targets": targets, "weights": values(g, n).abs()}

    def run(a: Tensors, op: Callable[..., tuple[Tensor, Tensor]], head: object) -> dict[str, Tensor]:
        wide = torch.float64 if a["h"].dtype == torch.float64 else torch.float32
        dh = poisoned(n, d, dtype=a["h"].dtype) if gradient else None
        nll, _ = op(a["h"], head, a["targets"], a["weights"].to(wide), softcap=softcap, dh=dh)
        return {"nll": nll} if dh is None else {"nll": nll, "dh": dh}

    name = "linear_cross_entropy" + ("+dh" if gradient else "")
    case = f"N={n} d={d} V={v}" + (f" softcap {softcap:g}" if softcap else "") + (f" scale {scale:g}" * (scale != 1))
    return Trial(
        name, case, inputs,
        lambda a: run(a, linear_cross_entropy, a["head"]),
        lambda a: run(a, reference.linear_cross_entropy, _Matrix(a["head"])),
        useful=2 * (1 + gradient) * n * d * v,
    )  # fmt: skip


def trials() -> list[Trial]:
    """Small vocabularies that divide nothing, a softcap, extreme logits, size 1."""
    return [
        _cross_entropy_trial(37, 72, 700, gradient=True),
        _cross_entropy_trial(37, 72, 700, gradient=False),
        _cross_entropy_trial(5, 64, 300, gradient=True, softcap=10.0),
        _cross_entropy_trial(9, 33, 130, gradient=True, scale=30.0),
        _cross_entropy_trial(1, 16, 2, gradient=True),
    ]
