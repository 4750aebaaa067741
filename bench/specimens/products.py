"""Specimens of the kernels around frozen matrices: cross entropy over the vocabulary, quantised products."""

from collections.abc import Callable

import torch
from embedgrad.kernels.linear_cross_entropy import linear_cross_entropy
from embedgrad.kernels.packing import PackedWeight, quantize_int4, quantize_int8
from embedgrad.kernels.quantized_linear import quantized_linear, quantized_linear_backward
from torch import Tensor

from bench.capture import Launch
from embedgrad.backends import reference

from . import Cost, Specimen, Tensors, Trial
from .shapes import CASES, QWEN_1_5B, QWEN_7B, TARGETS, TOKENS, Model, poisoned, size, untouched, values


def _cross_entropy_cost(m: Model, dtype: torch.dtype, head_bytes: int, gradient: bool, launches: list[Launch]) -> Cost:
    walk = launches[0]
    rows_per, tile = walk.blocks["BLOCK_N"], walk.blocks["BLOCK_V"]
    row_blocks, splits = walk.grid[:2]
    n, d, v = TARGETS, m.width, m.vocabulary
    least = head_bytes + size((n * d * (2 if gradient else 1), dtype), (2 * n, torch.float32), (2 * n, torch.int64))
    tiles = row_blocks * -(-v // tile)
    read = row_blocks * head_bytes * (2 if gradient else 1) + tiles * rows_per * d * dtype.itemsize
    sums = (2 * tiles * rows_per + splits * n) * d * 4 if gradient else 0
    products = 2 if gradient else 1
    return Cost(
        least=least,
        moved=read + sums + splits * n * 20 + (least if gradient else 0),
        useful=2 * products * n * d * v,
        done=2 * products * tiles * rows_per * tile * d,
    )


def _cross_entropy(m: Model, dtype: torch.dtype, gradient: bool, stored: str = "") -> Specimen:
    h, dh = (untouched(TARGETS, m.width, dtype=dtype) for _ in range(2))
    head = _packed(stored, m.vocabulary, m.width) if stored else untouched(m.vocabulary, m.width, dtype=dtype)
    head_bytes = head.bytes if isinstance(head, PackedWeight) else head.nbytes
    targets, weights = torch.zeros(TARGETS, dtype=torch.int64), torch.ones(TARGETS)

    def run() -> None:
        linear_cross_entropy(h, head, targets, weights, dh=dh if gradient else None)

    return Specimen(
        "linear_cross_entropy" + "+dh" * gradient + ("+" + stored if stored else ""), m.name, dtype, run,
        lambda a: _cross_entropy_cost(m, dtype, head_bytes, gradient, a), matrix=True,
        kernels=("linear_cross_entropy_kernel",),
    )  # fmt: skip


# How the sources store their weights: (kind, has offsets). Groups of 32, as in GGUF.
FORMATS = {"int8": ("int8", False), "int4": ("int4", False), "int4+offset": ("int4", True)}
GROUP = 32


def _packed(name: str, rows: int, columns: int) -> PackedWeight:
    kind, with_offsets = FORMATS[name]
    stored = untouched(rows, columns, dtype=torch.int8)
    if kind == "int4":
        stored = untouched(rows, columns // 2, dtype=torch.uint8)
    scales = untouched(rows, columns // GROUP, dtype=torch.float16)
    offsets = untouched(rows, columns // GROUP, dtype=torch.float16) if with_offsets else None
    return PackedWeight("int8" if kind == "int8" else "int4", stored, scales, offsets, GROUP, (rows, columns))


def _quantized(m: Model, dtype: torch.dtype, name: str, backward: bool, tokens: int) -> Specimen:
    """The gate/up matrix [2F, d], the largest product of a layer."""
    n, k = 2 * m.ffn, m.width
    weight = _packed(name, n, k)
    x, y = untouched(tokens, k, dtype=dtype), untouched(tokens, n, dtype=dtype)

    def run() -> None:
        if backward:
            quantized_linear_backward(y, weight, out=x)
        else:
            quantized_linear(x, weight, out=y)

    def cost(launches: list[Launch]) -> Cost:
        """Every tile of rows reads all of W, every tile of W's rows (columns) reads all of x (dy)."""
        (launch,) = launches
        rows, others = launch.grid[:2]
        read, written = (tokens * n, tokens * k) if backward else (tokens * k, tokens * n)
        useful = 2 * tokens * n * k
        return Cost(
            least=weight.bytes + size((read + written, dtype)),
            moved=rows * weight.bytes + size((others * read + written, dtype)),
            useful=useful,
            done=useful * rows * launch.blocks["BLOCK_M"] // tokens,
        )

    op = ("quantized_linear_backward" if backward else "quantized_linear") + "+" + name
    return Specimen(op, m.name + ("" if tokens > 64 else f" {tokens} rows"), dtype, run, cost, matrix=True)


def specimens() -> list[Specimen]:
    """Loss alone and with its gradient, and both directions of a quantised product, at both models' sizes."""
    losses = [_cross_entropy(m, dtype, gradient) for m, dtype in CASES for gradient in (True, False)]
    steps = [
        _quantized(m, dtype, name, backward, TOKENS)
        for m, dtype in CASES
        for name in FORMATS
        for backward in (False, True)
    ]
    losses += [_cross_entropy(QWEN_1_5B, torch.bfloat16, True, name) for name in FORMATS]
    few = [_quantized(QWEN_7B, torch.bfloat16, name, backward, 16) for name in FORMATS for backward in (False, True)]
    return [*losses, *steps, *few]


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
    n: int, d: int, v: int, gradient: bool, softcap: float | None = None, scale: float = 1.0, stored: str = ""
) -> Trial:
    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        targets = torch.randint(-1, v, (n,), generator=g)
        head = values(g, v, d, scale=scale * d**-0.5)
        return {"h": values(g, n, d), "head": head, "targets": targets, "weights": values(g, n).abs()}

    def packed(head: Tensor) -> PackedWeight:
        """Made from the same fp32 values in every type, so that all three ways see the same weights."""
        quantize = quantize_int8 if FORMATS[stored][0] == "int8" else quantize_int4
        return quantize(head.bfloat16().float(), GROUP)[0]

    def head_of(a: Tensors) -> Tensor:
        return packed(a["head"]).dequantize(a["h"].dtype) if stored else a["head"]

    def run(a: Tensors, op: Callable[..., tuple[Tensor, Tensor]], head: object) -> dict[str, Tensor]:
        wide = torch.float64 if a["h"].dtype == torch.float64 else torch.float32
        dh = poisoned(n, d, dtype=a["h"].dtype) if gradient else None
        nll, _ = op(a["h"], head, a["targets"], a["weights"].to(wide), softcap=softcap, dh=dh)
        return {"nll": nll} if dh is None else {"nll": nll, "dh": dh}

    name = "linear_cross_entropy" + "+dh" * gradient + ("+" + stored if stored else "")
    case = f"N={n} d={d} V={v}" + (f" softcap {softcap:g}" if softcap else "") + (f" scale {scale:g}" * (scale != 1))
    return Trial(
        name, case, inputs,
        lambda a: run(a, linear_cross_entropy, packed(a["head"]) if stored else a["head"]),
        lambda a: run(a, reference.linear_cross_entropy, _Matrix(head_of(a))),
        useful=2 * (1 + gradient) * n * d * v,
    )  # fmt: skip


def _quantized_trial(m: int, n: int, k: int, name: str, backward: bool, bias: bool = False) -> Trial:
    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        kind, _ = FORMATS[name]
        weight, _ = (quantize_int8 if kind == "int8" else quantize_int4)(values(g, n, k, scale=k**-0.5).float(), GROUP)
        found = {"x": values(g, m, n if backward else k), "bias": values(g, n)}
        offsets = {} if weight.offsets is None else {"offsets": weight.offsets.double()}
        return found | {"packed": weight.packed, "scales": weight.scales.double(), **offsets}

    def weight_of(a: Tensors) -> PackedWeight:
        """Scales were stored in 16 bits, so that every type but bf16 holds them; the kernel gets them as stored."""
        kind = "int8" if FORMATS[name][0] == "int8" else "int4"
        return PackedWeight(kind, a["packed"], a["scales"].half(), _half(a.get("offsets")), GROUP, (n, k))

    def run(a: Tensors) -> dict[str, Tensor]:
        out = poisoned(m, k if backward else n, dtype=a["x"].dtype)
        if backward:
            return {"out": quantized_linear_backward(a["x"], weight_of(a), out=out)}
        return {"out": quantized_linear(a["x"], weight_of(a), out=out, bias=a["bias"] if bias else None)}

    def plain(a: Tensors) -> dict[str, Tensor]:
        w = weight_of(a).dequantize(a["x"].dtype)
        y = a["x"] @ (w if backward else w.T)
        return {"out": y + a["bias"] if bias else y}

    op = ("quantized_linear_backward" if backward else "quantized_linear") + "+" + name
    case = f"M={m} N={n} K={k}" + " bias" * bias
    return Trial(op, case, inputs, run, plain, useful=2 * m * n * k)


def _half(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.half()


def trials() -> list[Trial]:
    """Small vocabularies that divide nothing, a softcap, extreme logits, size 1."""
    return [
        _cross_entropy_trial(37, 72, 700, gradient=True),
        _cross_entropy_trial(37, 72, 700, gradient=False),
        _cross_entropy_trial(5, 64, 300, gradient=True, softcap=10.0),
        _cross_entropy_trial(9, 33, 130, gradient=True, scale=30.0),
        _cross_entropy_trial(1, 16, 2, gradient=True),
        *(_cross_entropy_trial(11, 96, 300, gradient=True, stored=name) for name in ("int8", "int4+offset")),
        *(
            _quantized_trial(37, 70, 96, name, backward)
            for name in ("int8", "int4+offset")
            for backward in (False, True)
        ),
        *(
            _quantized_trial(3, 33, 77, name, backward)
            for name in ("int8", "int4+offset")
            for backward in (False, True)
        ),
        _quantized_trial(5, 40, 64, "int8", backward=False, bias=True),
    ]
