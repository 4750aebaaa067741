"""Products with int8 and int4 weights beside cuBLAS on bfloat16, and how fast the weights are dequantised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from embedgrad.kernels.packing import quantize_int4, quantize_int8

from bench.harness.markdown import table
from bench.harness.rows import Row
from bench.on_gpu.section import OURS, Bench, Job, Section, figure, relative_error, torch_version
from bench.on_gpu.show import TIMED, grouped, pick, us
from embedgrad.backends.triton import OPS as ours
from embedgrad.model.frozen import Widening
from embedgrad.model.packed import PackedMatrix

QUANTISE: dict[str, Callable[..., Any]] = {"int8": quantize_int8, "int4": quantize_int4}
WAYS = ("forward", "backward")


def _case(kind: str, matrix: tuple[int, int], way: str, rows: int) -> dict[str, Any]:
    return {"kind": kind, "outputs": matrix[0], "inputs": matrix[1], "rows": rows, "pass": way, "timed": "cold"}


def _products(bench: Bench, kind: str, matrix: tuple[int, int]) -> list[Row]:
    (n, k), device = matrix, bench.device
    packed = QUANTISE[kind](device.random(n, k, dtype=torch.float32, scale=0.05))[0]
    full = packed.dequantize().to(device.dtype)
    wide = torch.empty_like(full)
    widening = Widening(device.dtype, device.where, lambda weight, out: ours.dequantize(weight, out=out))
    whole = PackedMatrix([packed], None, widening, ours)
    ours.dequantize(packed, out=wide)
    found = [_row("embedgrad", _case(kind, matrix, "dequantize", 0), device.seconds(lambda: ours.dequantize(
        packed, out=wide)), relative_error(wide, full), bytes=packed.bytes + wide.nbytes)]  # fmt: skip
    for rows in bench.sizes.rows:
        x, dy = device.random(rows, k), device.random(rows, n)
        y, dx = device.empty(rows, n), device.empty(rows, k)
        ways: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[], float]]] = {
            "forward": (
                lambda: whole.forward(x, out=y), lambda: torch.mm(x, full.T, out=y),  # noqa: B023
                lambda: relative_error(y, x.float() @ full.float().T),  # noqa: B023
            ),
            "backward": (
                lambda: whole.backward(dy, out=dx), lambda: torch.mm(dy, full, out=dx),  # noqa: B023
                lambda: relative_error(dx, dy.float() @ full.float()),  # noqa: B023
            ),
        }  # fmt: skip
        for way, (our, plain, error) in ways.items():
            our()
            wrong = error()
            if not wrong < 0.02:
                raise ValueError(f"{kind} {way} with {rows} rows is wrong by {wrong:.1e}")
            case = _case(kind, matrix, way, rows)
            found.append(_row("embedgrad", case, device.seconds(our, 0.03), wrong))
            seconds = device.seconds(plain, 0.03)
            found.append(figure("quantized", "cuBLAS, bf16", seconds, case, version=torch_version()))
    return found


def _row(contender: str, case: dict[str, Any], seconds: list[float], error: float, **more: Any) -> Row:
    return figure("quantized", contender, seconds, case, version=OURS, error=error, **more)


def _jobs(bench: Bench) -> Iterator[Job]:
    for matrix in bench.sizes.matrices:
        for kind in QUANTISE:
            yield Job(f"{kind} {matrix}", partial(_products, bench, kind, matrix), 4)


def _table(rows: Sequence[Row]) -> str:
    cells: list[Sequence[object]] = []
    for (case, at), found in grouped(rows, _asked).items():
        assert isinstance(case, tuple)
        matrix, kind, count, timed = case
        told = f"{count:,}" if count else "dequantise"
        ways = WAYS if count else ("dequantize",)
        pairs = [us(pick(found, name, **{"pass": way})) for way in ways for name in ("embedgrad", "cuBLAS, bf16")]
        cells.append((kind, matrix, told, at, TIMED[timed], *pairs[: 4 if count else 1]))
    heads = ("µs", "outputs × inputs", "rows", "commit", "timed", "forward", "cuBLAS", "backward", "cuBLAS on bf16")
    return table(heads, [[*cell, *[None] * (len(heads) - len(cell))] for cell in cells])


def _asked(one: Row) -> tuple[str, str, int, str]:
    case = one.case
    matrix = f"{int(case['outputs']):,} × {int(case['inputs']):,}"
    return matrix, str(case["kind"]), int(case["rows"]), str(case["timed"])


SECTION = Section("quantized", "How long are products with int8 and int4 weights?", 35, _jobs, _table)
