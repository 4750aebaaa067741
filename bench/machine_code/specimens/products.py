"""Frozen matrices: cross entropy over the vocabulary, quantised products."""

from typing import Any, Literal

import torch
from embedgrad.kernels.packing import PackedWeight, quantize_int4, quantize_int8
from torch import Tensor

from bench.machine_code.capture import Launch
from bench.machine_code.specimens.base import Cost, Specimen, Tensors, Trial
from bench.machine_code.specimens.shapes import (
    CASES,
    QWEN_1_5B,
    QWEN_7B,
    TARGETS,
    TOKENS,
    Model,
    poisoned,
    size,
    untouched,
    values,
    wide,
)
from embedgrad.backends.base import Backend
from embedgrad.backends.triton import OPS

# How files store their weights: (kind, has offsets). Groups of 32, as in GGUF.
FORMATS: dict[str, tuple[Literal["int8", "int4"], bool]] = {
    "int8": ("int8", False), "int4": ("int4", False), "int4+offset": ("int4", True),
}  # fmt: skip
GROUP = 32


class _Head:
    """A head as backends take it: one stored part, and products in the type of x or dy for the reference."""

    def __init__(self, stored: Tensor | PackedWeight) -> None:
        self.parts: list[Any] = [stored]
        self.shape = (stored.shape[0], stored.shape[1])

    def _weight(self, dtype: torch.dtype) -> Tensor:
        (stored,) = self.parts
        return stored.dequantize(dtype) if isinstance(stored, PackedWeight) else stored

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        return out.copy_(x @ self._weight(x.dtype).T)

    def backward(self, dy: Tensor, out: Tensor) -> Tensor:
        return out.copy_(dy @ self._weight(dy.dtype))


def _cross_entropy(m: Model, dtype: torch.dtype, gradient: bool, stored: str = "") -> Specimen:
    n, d, v = TARGETS, m.width, m.vocabulary
    h, dh = (untouched(n, d, dtype=dtype) for _ in range(2))
    part = _packed(stored, v, d) if stored else untouched(v, d, dtype=dtype)
    head, head_bytes = _Head(part), part.bytes if isinstance(part, PackedWeight) else part.nbytes
    targets, weights = torch.zeros(n, dtype=torch.int64), torch.ones(n)

    def run() -> None:
        OPS.linear_cross_entropy(h, head, targets, weights, dh=dh if gradient else None)

    def cost(launches: list[Launch]) -> Cost:
        walk, products = launches[0], 1 + gradient
        rows_per, tile = walk.blocks["BLOCK_N"], walk.blocks["BLOCK_V"]
        row_blocks, splits = walk.grid[:2]
        least = head_bytes + size((n * d * products, dtype), (2 * n, torch.float32), (2 * n, torch.int64))
        tiles = row_blocks * -(-v // tile)
        read = row_blocks * head_bytes * products + tiles * rows_per * d * dtype.itemsize
        sums = (2 * tiles * rows_per + splits * n) * d * 4 if gradient else 0
        return Cost(
            least=least,
            moved=read + sums + splits * n * 20 + (least if gradient else 0),
            useful=2 * products * n * d * v,
            done=2 * products * tiles * rows_per * tile * d,
        )

    op = "linear_cross_entropy" + "+dh" * gradient + ("+" + stored if stored else "")
    return Specimen(op, m.name, dtype, run, cost, matrix=True, helpers=("linear_cross_entropy_merge_kernel",))


def _packed(name: str, rows: int, columns: int) -> PackedWeight:
    kind, with_offsets = FORMATS[name]
    scales = untouched(rows, columns // GROUP, dtype=torch.float16)
    offsets = untouched(rows, columns // GROUP, dtype=torch.float16) if with_offsets else None
    if kind == "int8":
        quants = untouched(rows, columns, dtype=torch.int8)
    else:
        quants = untouched(rows, columns // 2, dtype=torch.uint8)
    return PackedWeight(kind, quants, scales, offsets, GROUP, (rows, columns))


def _quantized(m: Model, dtype: torch.dtype, name: str, backward: bool, tokens: int) -> Specimen:
    """The gate/up matrix [2F, d], the largest product of a layer."""
    n, k = 2 * m.ffn, m.width
    weight = _packed(name, n, k)
    x, y = untouched(tokens, k, dtype=dtype), untouched(tokens, n, dtype=dtype)

    def run() -> None:
        if backward:
            OPS.quantized_linear_backward(y, weight, out=x)
        else:
            OPS.quantized_linear(x, weight, out=y)

    def cost(launches: list[Launch]) -> Cost:
        """Every tile of rows reads all of W, every tile of W's rows (columns) reads all of x (dy)."""
        (launch,) = launches
        rows, others = launch.grid[:2]
        read, written = (y.numel(), x.numel()) if backward else (x.numel(), y.numel())
        useful = 2 * tokens * n * k
        return Cost(
            least=weight.bytes + size((read + written, dtype)),
            moved=rows * weight.bytes + size((others * read + written, dtype)),
            useful=useful,
            done=useful * rows * launch.blocks["BLOCK_M"] // tokens,
        )

    model = m.name if tokens == TOKENS else f"{m.name} {tokens} rows"
    return Specimen(_quantized_name(name, backward), model, dtype, run, cost, matrix=True)


def _quantized_name(name: str, backward: bool) -> str:
    return "quantized_linear" + "_backward" * backward + "+" + name


def specimens() -> list[Specimen]:
    """The loss alone and with its gradient, and both directions of a quantised product, at both models' sizes."""
    ways = [(name, backward) for name in FORMATS for backward in (False, True)]
    return [
        *(_cross_entropy(m, dtype, gradient) for m, dtype in CASES for gradient in (True, False)),
        *(_cross_entropy(QWEN_1_5B, torch.bfloat16, True, name) for name in FORMATS),
        *(_quantized(m, dtype, name, backward, TOKENS) for m, dtype in CASES for name, backward in ways),
        *(_quantized(QWEN_7B, torch.bfloat16, name, backward, 16) for name, backward in ways),
    ]


def _quantize(name: str, weight: Tensor) -> PackedWeight:
    return (quantize_int8 if FORMATS[name][0] == "int8" else quantize_int4)(weight, GROUP)[0]


def _cross_entropy_trial(
    n: int, d: int, v: int, gradient: bool = True, softcap: float | None = None, scale: float = 1.0, stored: str = ""
) -> Trial:
    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        targets = torch.randint(-1, v, (n,), generator=g)
        head = values(g, v, d, scale=scale * d**-0.5)
        return {"h": values(g, n, d), "head": head, "targets": targets, "weights": values(g, n).abs()}

    def run(ops: Backend, a: Tensors) -> dict[str, Tensor]:
        dtype, head = a["h"].dtype, a["head"]
        # A packed head is made from the same bfloat16 values in every type, so that all types see the same weights.
        taken = _Head(_quantize(stored, head.bfloat16().float()) if stored else head)
        dh = poisoned(n, d, dtype=dtype) if gradient else None
        nll, _ = ops.linear_cross_entropy(
            a["h"], taken, a["targets"], a["weights"].to(wide(dtype)), softcap=softcap, dh=dh
        )
        return {"nll": nll} if dh is None else {"nll": nll, "dh": dh}

    name = "linear_cross_entropy" + "+dh" * gradient + ("+" + stored if stored else "")
    case = f"N={n} d={d} V={v}" + (f" softcap {softcap:g}" if softcap else "") + (f" scale {scale:g}" * (scale != 1))
    return Trial(name, case, inputs, run, useful=2 * (1 + gradient) * n * d * v)


def _quantized_trial(m: int, n: int, k: int, name: str, backward: bool, bias: bool = False) -> Trial:
    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        weight = _quantize(name, values(g, n, k, scale=k**-0.5).float())
        found = {"x": values(g, m, n if backward else k), "bias": values(g, n)}
        offsets = {} if weight.offsets is None else {"offsets": weight.offsets.double()}
        return found | {"packed": weight.packed, "scales": weight.scales.double(), **offsets}

    def run(ops: Backend, a: Tensors) -> dict[str, Tensor]:
        x, added = a["x"], a["bias"] if bias else None
        # 16 bits hold the scales; so does every type but bfloat16.
        offsets = a["offsets"].half() if "offsets" in a else None
        weight = PackedWeight(FORMATS[name][0], a["packed"], a["scales"].half(), offsets, GROUP, (n, k))
        if not ops.multiplies_packed:
            w = weight.dequantize(x.dtype)
            y = x @ (w if backward else w.T)
            return {"out": y if added is None else y + added}
        out = poisoned(m, k if backward else n, dtype=x.dtype)
        if backward:
            return {"out": ops.quantized_linear_backward(x, weight, out=out)}
        return {"out": ops.quantized_linear(x, weight, out=out, bias=added)}

    case = f"M={m} N={n} K={k}" + " bias" * bias
    return Trial(_quantized_name(name, backward), case, inputs, run, useful=2 * m * n * k)


def trials() -> list[Trial]:
    """Small vocabularies that divide nothing, a softcap, extreme logits, size 1; both directions of a product."""
    return [
        _cross_entropy_trial(37, 72, 700),
        _cross_entropy_trial(37, 72, 700, gradient=False),
        _cross_entropy_trial(5, 64, 300, softcap=10.0),
        _cross_entropy_trial(9, 33, 130, scale=30.0),
        _cross_entropy_trial(1, 16, 2),
        *(_cross_entropy_trial(11, 96, 300, stored=name) for name in ("int8", "int4+offset")),
        *(
            _quantized_trial(*shape, name, backward)
            for shape in ((37, 70, 96), (3, 33, 77))
            for name in ("int8", "int4+offset")
            for backward in (False, True)
        ),
        _quantized_trial(5, 40, 64, "int8", backward=False, bias=True),
    ]
