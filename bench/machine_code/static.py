"""Compiles every kernel for GPUs that are not here, and reads the machine code: the static half of `bench kernels`.

Each specimen's operation is called once for each target, on tensors that nobody reads. What it would launch is compiled
ahead of time. Roofline times come from data-sheet rates (`bench.harness.accelerators`) and the least bytes and
operations that the result needs; no GPU time has been measured.
"""

import argparse
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

import torch
import triton
from embedgrad.kernels import launch as launch_parameters
from embedgrad.kernels.launch_table import ROWS

from bench.harness import models
from bench.harness.accelerators import ACCELERATORS, LIMITS, Accelerator, occupancy
from bench.harness.rows import Row, row
from bench.machine_code.capture import Launch, captured
from bench.machine_code.reading import inspect
from bench.machine_code.specimens import specimens
from bench.machine_code.specimens.base import Cost, Specimen

ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")
QUICK_ARCHES = ("sm_90", "gfx942")
ONE = ("sm_90",)
SHOWN = (models.QWEN_1_5B, models.QWEN_7B)  # in the documents, in bfloat16; the prompt's step in float32


def report(args: argparse.Namespace) -> list[Row]:
    """Compile, and say what breaks a limit."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    names = wanted(args)
    if args.every or args.quick or args.arch:
        found = compile_all(names, args.arch or (QUICK_ARCHES if args.quick else ARCHES), args.jobs)
    else:
        small = [name for name in names if f"/{SHOWN[0]}/" in name]
        others = [name for name in names if name not in small]
        found = compile_all(small, ARCHES, args.jobs) + compile_all(others, ONE, args.jobs)
    broken = violations(found)
    print(f"{len(found)} compiled kernels, {len(broken)} break a limit")
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return found


def wanted(args: argparse.Namespace) -> list[str]:
    """The specimens to compile: those of the documents, of --only and --dtype, or --every one.

    --quick keeps one of each operation, in bfloat16 where there is one.
    """
    types = args.dtype
    found = [s for s in specimens() if args.only in s.name and (not types or s.name.rsplit("/", 1)[1] in types)]
    if not (args.every or args.quick or args.only or types):
        found = [s for s in found if s.model in SHOWN and (s.dtype == torch.bfloat16 or s.op.startswith("prompt_step"))]
    if args.quick:
        first: dict[str, Specimen] = {}
        for s in sorted(found, key=lambda s: s.dtype != torch.bfloat16):
            first.setdefault(s.op, s)
        found = list(first.values())
    return [s.name for s in found]


def compile_all(names: Iterable[str], arches: Iterable[str], jobs: int) -> list[Row]:
    """Compile in `jobs` processes (each imports torch and Triton once); rows in the order of the names."""
    work = [(name, arch) for arch in arches for name in names]
    if jobs <= 1 or len(work) < 4:
        return [found for job in work for found in _compile_one(job)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return [found for rows in pool.map(_compile_one, work, chunksize=4) for found in rows]


def _compile_one(job: tuple[str, str]) -> list[Row]:
    """The rows of one specimen on one target, one for each kernel that it launches."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    name, arch = job
    specimen = next(s for s in specimens() if s.name == name)
    with launch_parameters.observed() as used:
        launches = captured(specimen.run, arch)
    cost, table_rows = specimen.cost(launches), [ROWS.index(row) for _, row in used if row is not None]
    return [_row(specimen, launch, cost, table_rows) for launch in launches]


def _row(specimen: Specimen, launch: Launch, cost: Cost, table_rows: list[int]) -> Row:
    code = inspect(launch.compile(), launch.arch)
    warps, watched = int(launch.options["num_warps"]), launch.name not in specimen.helpers
    case = {"part": "static", "specimen": specimen.name, "op": specimen.op, "model": specimen.model,
            "dtype": str(specimen.dtype).removeprefix("torch."), "arch": launch.arch}  # fmt: skip
    return row(
        "kernels", launch.name, f"triton {triton.__version__}", [float(code.registers)], case=case, unit="registers",
        counted=True,
        blocks=launch.blocks, warps=warps, stages=launch.options["num_stages"],
        spills=code.spills, shared=code.shared, shared_limit=LIMITS[launch.arch].shared_block,
        occupancy=occupancy(launch.arch, code.registers, code.shared, warps),
        matrix=dict(code.matrix), vector_loads=code.vector_loads,
        loads={str(bits): n for bits, n in sorted(code.loads.items())}, instructions=code.instructions,
        needs_matrix=watched and specimen.matrix and specimen.dtype.itemsize == 2,
        needs_vector_loads=watched and specimen.streaming, in_place=specimen.in_place,
        least_bytes=cost.least, moved_bytes=cost.moved, useful_operations=cost.useful, done_operations=cost.done,
        intensity=cost.useful / cost.least,
        roofline_us={a.name: 1e6 * _roofline(a, specimen, cost) for a in ACCELERATORS}, table_rows=table_rows,
    )  # fmt: skip


def _roofline(accelerator: Accelerator, specimen: Specimen, cost: Cost) -> float:
    rate = accelerator.matrix_rate(specimen.dtype) if specimen.matrix else accelerator.vector_fp32
    return max(cost.least / accelerator.bandwidth, cost.useful / rate)


def violations(rows: Iterable[Row]) -> list[str]:
    """What breaks a limit, a sentence each: spills, too much shared memory, no matrix or 128-bit instructions."""
    found = []
    for one in rows:
        where, m = f"{one.case['specimen']} {one.contender} on {one.case['arch']}", one.more
        if m["spills"]:
            found.append(f"{where}: {m['spills']} spills")
        if m["shared"] > m["shared_limit"]:
            found.append(f"{where}: {m['shared']} bytes of shared memory, the limit is {m['shared_limit']}")
        if m["occupancy"] == 0:
            found.append(f"{where}: not even one block fits a multiprocessor")
        if m["needs_matrix"] and not m["matrix"]:
            found.append(f"{where}: no matrix instruction")
        if m["needs_vector_loads"] and m["vector_loads"] < 0.5:
            found.append(f"{where}: only {m['vector_loads']:.0%} of the bytes loaded come in 128-bit loads")
    return found
