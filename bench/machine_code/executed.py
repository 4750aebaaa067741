"""Runs the kernels' gfx942 machine code in an emulator: the executed half of `bench kernels`.

Each trial's outputs are compared with the float64 reference by the three-way rule. The executed instructions are
counted by kind, a measure of cost without noise. It says nothing about time, caches or bytes moved.
"""

import argparse
import multiprocessing
import sys
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

from bench.harness.rows import Row, row
from bench.machine_code import emulator
from bench.machine_code.specimens import trials
from bench.machine_code.specimens.base import Tensors, Trial
from embedgrad.backends.reference import OPS as reference
from embedgrad.backends.triton import OPS

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Half a unit in the last place of the output's type.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def report(args: argparse.Namespace) -> list[Row]:
    """Emulate all trials (--quick: one of each operation, in one type), and say what is wrong."""
    reason = emulator.unavailable()
    if reason:
        print(f"skipped: {reason}")
        return []
    chosen = [t for t in trials() if args.only in t.name]
    if args.quick:
        chosen = list({t.op: t for t in reversed(chosen)}.values())[::-1]
    work = []
    for t in chosen:
        types = [name for name, dtype in TYPES.items() if dtype in t.types and name in (args.dtype or TYPES)]
        work += [(t.name, name) for name in (types[:1] if args.quick else types)]
    if args.jobs > 1 and len(work) > 3:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(_one, work))
    else:
        found = [_one(job) for job in work]
    wrong = [one for one in found if not one.more["right"]]
    print(f"{len(found)} trials, {len(wrong)} wrong")
    for one in wrong:
        where = f"{one.contender} {one.case['dtype']}: {one.more['output']}"
        print(f"{where} {one.median:.2e} > {one.more['allowed']:.2e}", file=sys.stderr)
    return found


def cast(inputs: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """The trial's inputs with every floating-point tensor in `dtype`."""
    return {k: v.to(dtype) if v.dtype.is_floating_point else v for k, v in inputs.items()}


def three_way(kernel: Tensor, plain: Tensor, truth: Tensor, tolerance: float) -> tuple[float, float]:
    """The kernel's relative error and the most it may be: 2 · plain torch's own error + tolerance; by 2-norm.

    Infinite elements of the truth must be met exactly. NaN or a missed infinity is an infinite error.
    """
    kernel, plain = kernel.double(), plain.double()
    infinite = truth.isinf()
    if kernel.isnan().any() or not torch.equal(kernel[infinite], truth[infinite]):
        return float("inf"), tolerance
    finite = ~infinite
    size = float(truth[finite].norm()) or 1.0
    error = float((kernel - truth)[finite].norm()) / size
    return error, 2 * float((plain - truth)[finite].norm()) / size + tolerance


def worst(trial: Trial, found: Tensors, inputs: Tensors) -> tuple[str, float, float]:
    """The output that comes nearest to its bound or exceeds it most: its name, error, and the error allowed."""
    truth, plain = (trial.run(reference, given) for given in (cast(inputs, torch.float64), inputs))
    judged = []
    for name, out in found.items():
        tolerance = {**TOLERANCE, **(trial.tolerance or {})}.get(out.dtype, 0.0)
        judged.append((name, *three_way(out, plain[name], truth[name], tolerance)))
    return max(judged, key=lambda one: one[1] / one[2])


def run_trial(trial: Trial, dtype: torch.dtype, seed: int = 0) -> Row:
    """Emulate one trial; the row has the error, the error allowed, and the executed instructions by kind."""
    inputs = cast(trial.inputs(seed), dtype)
    with emulator.emulated() as executions:
        found = trial.run(OPS, inputs)
    output, error, allowed = worst(trial, found, inputs)
    kinds = {kind: sum(e.by_kind()[kind] for e in executions) for kind in emulator.KINDS}
    done = sum(e.matrix_operations() for e in executions)
    return _row(
        trial, dtype, error, output=output, allowed=allowed, right=error <= allowed, **kinds,
        launches=[{"kernel": e.name, "grid": e.grid, "warps": e.warps, **e.by_kind()} for e in executions],
        matrix_operations=done, useful_operations=trial.useful,
        done_per_useful=done / trial.useful if trial.useful else None,
        vector_per_matrix=kinds["vector"] / kinds["matrix"] if kinds["matrix"] else None,
    )  # fmt: skip


def _one(job: tuple[str, str]) -> Row:
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    name, dtype = job
    trial = next(t for t in trials() if t.name == name)
    try:
        return run_trial(trial, TYPES[dtype])
    except Exception as fault:  # a trial that cannot run is a wrong one, and the others still count
        traceback.print_exc()
        nothing = dict.fromkeys((*emulator.KINDS, "matrix_operations", "useful_operations"), 0)
        return _row(
            trial, TYPES[dtype], float("inf"), output=repr(fault), allowed=0.0, right=False, launches=[],
            done_per_useful=None, vector_per_matrix=None, **nothing,
        )  # fmt: skip


def _row(trial: Trial, dtype: torch.dtype, error: float, **more: Any) -> Row:
    case = {"part": "executed", "dtype": str(dtype).removeprefix("torch.")}
    return row(
        "kernels", trial.name, f"triton {triton.__version__}", [min(error, sys.float_info.max)], case=case,
        unit="error", counted=True, op=trial.op, **more,
    )  # fmt: skip
