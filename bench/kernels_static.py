"""Compiles every kernel for GPUs that are not here and reads the machine code: the static half of `bench kernels`.

Each specimen's launcher is called once for each target on tensors that exist only as shapes; what it would launch is
compiled ahead of time. Roofline times come from data-sheet rates (machines.py) and the bytes and operations that the
result needs at least; no GPU time has been measured.
"""

import argparse
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from bench import rows

ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")
QUICK_ARCHES = ("sm_90", "gfx942")
ONE = ("sm_90",)
SHOWN = ("Qwen2.5-Math-1.5B", "Qwen2.5-Math-7B")  # in the documents, in bfloat16 and the prompt's own float32

Row = dict[str, Any]


def wanted_names(args: argparse.Namespace) -> list[str]:
    """The specimens to compile: those of the documents, or of --only and --dtype, or --every one; --quick keeps one of
    each op, bf16 if it can."""
    from .specimens import specimens

    types = args.dtype
    found = [s for s in specimens() if args.only in s.name and (not types or s.name.rsplit("/", 1)[1] in types)]
    if not (args.every or args.quick or args.only or types):
        found = [s for s in found if s.model in SHOWN and (s.dtype == torch.bfloat16 or s.op.startswith("prompt_step"))]
    if args.quick:
        one_of_each: dict[str, Any] = {}
        for s in sorted(found, key=lambda s: not s.name.endswith("/bfloat16")):
            one_of_each.setdefault(s.op, s)
        found = list(one_of_each.values())
    return [s.name for s in found]


def _compile_one(job: tuple[str, str]) -> list[Row]:
    """The rows of one specimen on one target: one for each distinct kernel it launches."""
    from embedgrad.kernels import launch as launch_parameters
    from embedgrad.kernels.launch_table import ROWS

    from .capture import captured
    from .machine_code import inspect
    from .machines import LIMITS, MACHINES, occupancy
    from .specimens import specimens

    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    name, arch = job
    specimen = next(s for s in specimens() if s.name == name)
    with launch_parameters.observed() as used:
        launches = captured(specimen.run, arch)
    cost = specimen.cost(launches)
    roofline = {
        m.name: 1e6 * max(cost.least / m.bandwidth, cost.useful / _rate(m, specimen.matrix, specimen.dtype))
        for m in MACHINES
    }
    rows = []
    for launch in launches:
        code = inspect(launch.compile(), arch)
        warps = int(launch.options["num_warps"])
        watched = not specimen.kernels or launch.name in specimen.kernels
        rows.append(
            {
                "specimen": name,
                "op": specimen.op,
                "model": specimen.model,
                "dtype": str(specimen.dtype).removeprefix("torch."),
                "arch": arch,
                "kernel": launch.name,
                "grid": launch.grid,
                "blocks": launch.blocks,
                "warps": warps,
                "stages": launch.options["num_stages"],
                "registers": code.registers,
                "spills": code.spills,
                "shared": code.shared,
                "shared_limit": LIMITS[arch].shared_block,
                "occupancy": occupancy(arch, code.registers, code.shared, warps),
                "matrix": dict(code.matrix),
                "vector_loads": code.vector_loads,
                "loads": {str(bits): n for bits, n in sorted(code.loads.items())},
                "instructions": code.instructions,
                "needs_matrix": watched and specimen.matrix and specimen.dtype.itemsize == 2,
                "needs_vector_loads": watched and specimen.streaming,
                "in_place": specimen.in_place,
                "least_bytes": cost.least,
                "moved_bytes": cost.moved,
                "useful_operations": cost.useful,
                "done_operations": cost.done,
                "intensity": cost.useful / cost.least,
                "roofline_us": roofline,
                "table_rows": [ROWS.index(row) for _, row in used if row is not None],
            }
        )
    return rows


def _rate(machine: Any, matrix: bool, dtype: Any) -> float:
    return float(machine.matrix_rate(dtype) if matrix else machine.vector_fp32)


def compile_all(names: Iterable[str], arches: Iterable[str], jobs: int) -> list[Row]:
    """Compile in `jobs` processes (each imports torch and Triton once); rows in the order of the names."""
    work = [(name, arch) for arch in arches for name in names]
    if jobs <= 1 or len(work) < 4:
        return [row for job in work for row in _compile_one(job)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return [row for rows in pool.map(_compile_one, work, chunksize=4) for row in rows]


def violations(rows: Iterable[Row]) -> list[str]:
    """What the limits forbid, a sentence each: spills, too much shared memory, no matrix or wide instructions."""
    found = []
    for row in rows:
        where = f"{row['specimen']} {row['kernel']} on {row['arch']}"
        if row["spills"]:
            found.append(f"{where}: {row['spills']} spills")
        if row["shared"] > row["shared_limit"]:
            found.append(f"{where}: {row['shared']} bytes of shared memory, the limit is {row['shared_limit']}")
        if row["occupancy"] == 0:
            found.append(f"{where}: not even one block fits a multiprocessor")
        if row["needs_matrix"] and not row["matrix"]:
            found.append(f"{where}: no matrix instruction")
        if row["needs_vector_loads"] and row["vector_loads"] < 0.5:
            found.append(f"{where}: only {row['vector_loads']:.0%} of the bytes loaded come in 128-bit loads")
    return found


def as_row(row: Row) -> rows.Row:
    """A compiled kernel as the benches record it."""
    import triton

    keys = ("specimen", "op", "model", "dtype", "arch")
    return rows.row(
        "kernels", row["kernel"], f"triton {triton.__version__}", [float(row["registers"])], counted=True,
        unit="registers", case={"part": "static", **{key: row[key] for key in keys}},
        **{key: value for key, value in row.items() if key not in (*keys, "kernel", "registers", "grid")},
    )  # fmt: skip


def report(args: argparse.Namespace) -> list[rows.Row]:
    """Compile, and say what breaks a limit."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    names = wanted_names(args)
    if args.every or args.quick or args.arch:
        found = compile_all(names, args.arch or (QUICK_ARCHES if args.quick else ARCHES), args.jobs)
    else:
        small = [name for name in names if f"/{SHOWN[0]}/" in name]
        found = compile_all(small, ARCHES, args.jobs) + compile_all(
            [n for n in names if n not in small], ONE, args.jobs
        )
    broken = violations(found)
    print(f"{len(found)} compiled kernels, {len(broken)} break a limit")
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return [as_row(row) for row in found]
