"""Cases of the kernels around the frozen matrices: the loss of a block of logits, and quantised weights."""

from __future__ import annotations

from functools import cache

import torch

from embedgrad.backends.launch_check.case import Case, Tensors, named, normal, poisoned, seeded
from embedgrad.backends.triton import OPS as kernels
from embedgrad.kernels.packing import PackedWeight
from embedgrad.kernels.softmax_loss import softmax_loss as fused_loss

GROUP = 32
FORMS = ("int4", "int8")
"""int4 with an offset for each group, int8 without."""


def softmax_loss(rows: int, vocabulary: int, gradient: torch.dtype) -> Case:
    """Logits [rows, vocabulary] in float32, and their gradient in the type `gradient` in the same memory."""

    def inputs(device: torch.device) -> Tensors:
        g = seeded(device)
        targets = torch.randint(-1, vocabulary, (rows,), generator=g, device=device)
        weights = torch.rand(rows, generator=g, device=device) + 0.5
        return {"z": normal(g, rows, vocabulary, dtype=torch.float32, scale=3.0), "targets": targets, "w": weights}

    def fresh(a: Tensors) -> Tensors:
        return {"dz": a["z"].clone(), "nll": poisoned(a["w"]), "predicted": torch.full_like(a["targets"], -7)}

    def run(a: Tensors, out: Tensors) -> None:
        fused_loss(out["dz"], a["targets"], a["w"], dtype=gradient, nll=out["nll"], predicted=out["predicted"])

    def read(out: Tensors) -> Tensors:
        wider = out["dz"].element_size() // gradient.itemsize
        return {**out, "dz": out["dz"].view(gradient)[:, :vocabulary] if wider > 1 else out["dz"]}

    def plain(a: Tensors, out: Tensors) -> None:
        counted, at = a["targets"] >= 0, a["targets"].clamp_min(0)[:, None]
        log_p = torch.log_softmax(a["z"], 1)
        out["nll"].copy_(torch.where(counted, -log_p.gather(1, at)[:, 0], 0))
        out["predicted"].copy_(log_p.argmax(1))
        weight = torch.where(counted, a["w"], 0)[:, None]
        out["dz"].copy_(log_p.exp_().mul_(weight).scatter_add_(1, at, -weight))

    text = f"{rows} x {vocabulary}, gradient {named(gradient)}"
    sizes = {"width": vocabulary}
    return Case("softmax_loss", text, torch.float32, sizes, inputs, fresh, run, plain, read=read)


@cache
def _weight(form: str, n: int, k: int, device: torch.device) -> PackedWeight:
    """A random quantised matrix [n, k]; k is a multiple of two groups."""
    g = seeded(device)
    if form == "int8":
        packed = torch.randint(-127, 128, (n, k), generator=g, device=device, dtype=torch.int8)
    else:
        packed = torch.randint(0, 256, (n, k // 2), generator=g, device=device, dtype=torch.uint8)
    step = k**-0.5 / (64 if form == "int8" else 5)
    scales = ((torch.rand(n, k // GROUP, generator=g, device=device) + 0.5) * step).half()
    offsets = (-7.5 * scales.float()).half() if form == "int4" else None
    return PackedWeight("int8" if form == "int8" else "int4", packed, scales, offsets, GROUP, (n, k))


def dequantize(n: int, k: int, dtype: torch.dtype, form: str = "int4") -> Case:
    """W [n, k]."""

    def inputs(device: torch.device) -> Tensors:
        return {"like": torch.zeros((), dtype=dtype, device=device)}

    def fresh(a: Tensors) -> Tensors:
        return {"w": poisoned(a["like"], n, k)}

    def run(a: Tensors, out: Tensors) -> None:
        kernels.dequantize(_weight(form, n, k, out["w"].device), out=out["w"])

    def plain(a: Tensors, out: Tensors) -> None:
        out["w"].copy_(_weight(form, n, k, out["w"].device).dequantize(out["w"].dtype))

    columns = k if form == "int8" else k // 2
    text = f"{form} {n} x {k} {named(dtype)}"
    return Case("dequantize", text, dtype, {"width": columns}, inputs, fresh, run, plain)


def quantized_linear(
    rows: int, n: int, k: int, dtype: torch.dtype, form: str = "int4", backward: bool = False, reduce: bool = False
) -> Case:
    """x [rows, k] Wᵀ or dy [rows, n] W. reduce: for the parameters of the kernel that adds partial sums."""

    def inputs(device: torch.device) -> Tensors:
        return {"x": normal(seeded(device), rows, n if backward else k, dtype=dtype)}

    def fresh(a: Tensors) -> Tensors:
        return {"y": poisoned(a["x"], rows, k if backward else n)}

    def run(a: Tensors, out: Tensors) -> None:
        product = kernels.quantized_linear_backward if backward else kernels.quantized_linear
        product(a["x"], _weight(form, n, k, a["x"].device), out=out["y"])

    def plain(a: Tensors, out: Tensors) -> None:
        w = _weight(form, n, k, a["x"].device).dequantize(a["x"].dtype)
        out["y"].copy_(a["x"] @ (w if backward else w.T))

    text = f"{form} {rows} x {n} x {k} {named(dtype)}"
    if reduce:
        sizes = {"width": k if backward else n}
        return Case("quantized_linear_reduce", text, torch.float32, sizes, inputs, fresh, run, plain)
    name = "quantized_linear_backward" if backward else "quantized_linear"
    return Case(name, text, dtype, {"rows": rows}, inputs, fresh, run, plain)
