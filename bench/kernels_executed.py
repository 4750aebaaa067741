"""Runs the kernels' gfx942 machine code in an emulator: the executed half of `bench kernels`.

Each trial's outputs are held against the fp64 reference by the three-way rule, and the executed instructions are
counted by kind: a measure of cost that no noise touches. It says nothing about time, caches or bytes moved.
"""

import argparse
import multiprocessing
import sys
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from bench import rows

from . import cdna3
from .specimens import Tensors, Trial, trials

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Row = dict[str, Any]

# Half a unit in the last place of the output's type.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def cast(inputs: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """The trial's inputs with every floating-point tensor in `dtype`."""
    return {k: v.to(dtype) if v.dtype.is_floating_point else v for k, v in inputs.items()}


def three_way(kernel: Tensor, plain: Tensor, truth: Tensor, tolerance: float) -> tuple[float, float]:
    """Relative error of the kernel and the most it may be: 2 · plain torch's own error + tolerance; by 2-norm.

    Infinite elements of the truth must be met exactly; NaN or a missed infinity is an infinite error.
    """
    kernel, plain = kernel.double(), plain.double()
    infinite = truth.isinf()
    if kernel.isnan().any() or not torch.equal(kernel[infinite], truth[infinite]):
        return float("inf"), tolerance
    finite = ~infinite
    size = float(truth[finite].norm()) or 1.0
    error = float((kernel - truth)[finite].norm()) / size
    return error, 2 * float((plain - truth)[finite].norm()) / size + tolerance


def run_trial(trial: Trial, dtype: torch.dtype, seed: int = 0) -> Row:
    """Emulate one trial; the row has the error, what it may be, and the executed instructions by kind."""
    inputs = cast(trial.inputs(seed), dtype)
    truth = trial.reference(cast(inputs, torch.float64))
    plain = trial.reference(inputs)
    with cdna3.emulated() as executions:
        found = trial.kernel(inputs)
    worst, allowed, output = 0.0, float("inf"), ""
    for name, out in found.items():
        wanted = {**TOLERANCE, **(trial.tolerance or {})}.get(out.dtype, 0.0)
        error, bound = three_way(out, plain[name], truth[name], wanted)
        if not output or error / bound >= worst / allowed:
            worst, allowed, output = error, bound, name
    kinds = {kind: sum(e.by_kind()[kind] for e in executions) for kind in cdna3.KINDS}
    done = sum(e.matrix_operations() for e in executions)
    return {
        "trial": trial.name,
        "op": trial.op,
        "case": trial.case,
        "dtype": str(dtype).removeprefix("torch."),
        "launches": [{"kernel": e.name, "grid": e.grid, "warps": e.warps, **e.by_kind()} for e in executions],
        "output": output,
        "error": worst,
        "allowed": allowed,
        "right": worst <= allowed,
        **kinds,
        "matrix_operations": done,
        "useful_operations": trial.useful,
        "done_per_useful": done / trial.useful if trial.useful else None,
        "vector_per_matrix": kinds["vector"] / kinds["matrix"] if kinds["matrix"] else None,
    }


def _one(job: tuple[str, str]) -> Row:
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    name, dtype = job
    trial = next(t for t in trials() if t.name == name)
    try:
        return run_trial(trial, TYPES[dtype])
    except Exception as fault:  # a trial that cannot run is a wrong one, and the others still count
        traceback.print_exc()
        nothing = dict.fromkeys((*cdna3.KINDS, "matrix_operations", "useful_operations"), 0)
        ratios: Row = {"done_per_useful": None, "vector_per_matrix": None, "launches": []}
        wrong = {"output": repr(fault), "error": float("inf"), "allowed": 0.0, "right": False}
        return {"trial": name, "op": trial.op, "case": trial.case, "dtype": dtype, **wrong, **nothing, **ratios}


def print_rows(rows: list[Row]) -> None:
    """One line for each trial and type."""
    heads = (
        "trial", "type", "error", "allowed", *cdna3.KINDS[:-1], "matrix done / useful", "vector / matrix",
    )  # fmt: skip
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for row in rows:
        ratios = ("–" if row[k] is None else f"{row[k]:.2f}" for k in ("done_per_useful", "vector_per_matrix"))
        cells = [
            row["trial"], row["dtype"], f"{row['error']:.1e}", f"{row['allowed']:.1e}",
            *(str(row[kind]) for kind in cdna3.KINDS[:-1]), *ratios,
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def report(args: argparse.Namespace) -> list[rows.Row]:
    """Emulate all trials (--quick: one of each op, in one type), print the counts and what is wrong."""
    reason = cdna3.unavailable()
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
    print_rows(found)
    wrong = [row for row in found if not row["right"]]
    print(f"\n{len(found)} trials, {len(wrong)} wrong")
    for row in wrong:
        print(
            f"{row['trial']} {row['dtype']}: {row['output']} {row['error']:.2e} > {row['allowed']:.2e}", file=sys.stderr
        )
    return [as_row(row) for row in found]


def as_row(row: Row) -> rows.Row:
    """A trial as the benches record it."""
    import triton

    keys = ("trial", "dtype")
    more = {key: value for key, value in row.items() if key not in keys}
    return rows.row(
        "kernels", row["trial"], f"triton {triton.__version__}", [float(row["error"])], counted=True, unit="error",
        case={"part": "executed", "dtype": row["dtype"]}, **more,
    )  # fmt: skip
