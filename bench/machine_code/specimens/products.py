"""Frozen matrices: the loss of a block of logits, dequantising, products of a few rows with quantised matrices."""

from typing import Any, Literal

import torch
from embedgrad.kernels.packing import PackedWeight, quantize_int4, quantize_int8
from embedgrad.kernels.quantized_linear import FUSED_ROWS
from embedgrad.kernels.softmax_loss import softmax_loss
from torch import Tensor

from bench.machine_code.capture import Launch
from bench.machine_code.specimens.base import Cost, Specimen, Tensors, Trial
from bench.machine_code.specimens.shapes import (
    CASES,
    TARGETS,
    Model,
    poisoned,
    size,
    untouched,
    values,
    wide,
)
from embedgrad.backends.base import Backend
from embedgrad.backends.logits import DEVICE_LOGIT_BYTES, logit_rows
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


def _softmax_loss(m: Model, dtype: torch.dtype, gradient: bool) -> Specimen:
    """As many rows as the workspace holds at once."""
    v, n = m.vocabulary, logit_rows(TARGETS, m.vocabulary, DEVICE_LOGIT_BYTES)
    z, targets, weights = untouched(n, v, dtype=torch.float32), torch.zeros(n, dtype=torch.int64), torch.ones(n)
    nll, factor = torch.ones(n), torch.ones(n) if gradient and dtype == torch.float16 else None

    def run() -> None:
        softmax_loss(z, targets, weights if gradient else None, dtype=dtype, nll=nll, predicted=targets, factor=factor)

    def cost(launches: list[Launch]) -> Cost:
        """The logits are read a second time where their gradient is wanted; 10 operations a logit and walk."""
        read, written = size((n * v, torch.float32)), size((n * v, dtype)) if gradient else 0
        useful = 10 * n * v * (1 + gradient)
        return Cost(least=read + written, moved=read * (1 + gradient) + written, useful=useful, done=useful)

    return Specimen("softmax_loss" + "+dz" * gradient, m.name, dtype, run, cost, streaming=True, in_place=True)


def _dequantized(m: Model, dtype: torch.dtype, name: str) -> Specimen:
    n, k = 2 * m.ffn, m.width
    weight, out = _packed(name, n, k), untouched(n, k, dtype=dtype)

    def cost(launches: list[Launch]) -> Cost:
        moved = weight.bytes + out.nbytes
        return Cost(least=moved, moved=moved, useful=2 * n * k, done=2 * n * k)

    return Specimen("dequantize+" + name, m.name, dtype, lambda: OPS.dequantize(weight, out=out), cost, streaming=True)


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
        """Every tile of rows reads all of W, every tile of W's rows (columns) reads all of x (dy); and partial sums."""
        launch = launches[0]
        rows, others, splits = launch.grid
        read, written = (y.numel(), x.numel()) if backward else (x.numel(), y.numel())
        useful = 2 * tokens * n * k
        partial = 2 * splits * size((written, torch.float32)) if splits > 1 else 0
        return Cost(
            least=weight.bytes + size((read + written, dtype)),
            moved=rows * weight.bytes + size((others * read + written, dtype)) + partial,
            useful=useful,
            done=useful * rows * launch.blocks["BLOCK_M"] // tokens,
        )

    op, model = _quantized_name(name, backward), f"{m.name} {tokens} rows"
    return Specimen(op, model, dtype, run, cost, matrix=True, helpers=("quantized_linear_reduce_kernel",))


def _quantized_name(name: str, backward: bool) -> str:
    return "quantized_linear" + "_backward" * backward + "+" + name


def specimens() -> list[Specimen]:
    """The loss alone and with its gradient, dequantising, and both directions of a product of few rows."""
    ways = [(name, backward) for name in FORMATS for backward in (False, True)]
    return [
        *(_softmax_loss(m, dtype, gradient) for m, dtype in CASES for gradient in (True, False)),
        *(_dequantized(m, dtype, name) for m, dtype in CASES for name in FORMATS),
        *(
            _quantized(m, dtype, name, backward, rows)
            for m, dtype in CASES for rows in (16, FUSED_ROWS) for name, backward in ways
        ),
    ]  # fmt: skip


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


def _dequantize_trial(n: int, k: int, name: str) -> Trial:
    def inputs(seed: int) -> dict[str, Tensor]:
        return {"w": values(torch.Generator().manual_seed(seed), n, k)}

    def run(ops: Backend, a: Tensors) -> dict[str, Tensor]:
        # The weight is made from the same bfloat16 values in every type, so that all types see the same one.
        weight, dtype = _quantize(name, a["w"].bfloat16().float()), a["w"].dtype
        if not ops.quantized_rows:
            return {"out": weight.dequantize(dtype)}
        return {"out": ops.dequantize(weight, out=poisoned(n, k, dtype=dtype))}

    return Trial("dequantize+" + name, f"N={n} K={k}", inputs, run)


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
        if not ops.quantized_rows:
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
        *(_dequantize_trial(19, 100, name) for name in FORMATS),
    ]
