"""Whether what runs on the card is right: the project's tests, compiled; and every kernel in every type."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module, util
from pkgutil import iter_modules
from typing import Any

import embedgrad.kernels
import torch
from embedgrad.kernels import launch

from bench.harness.contenders import Case, tree_of
from bench.harness.markdown import table
from bench.harness.op_attention import Attention
from bench.harness.op_cases import cases
from bench.harness.rows import ROOT, Row
from bench.harness.unlaunched import kernel_name
from bench.on_gpu.section import OURS, Bench, Job, Section, figure, relative_error
from bench.on_gpu.show import grouped
from embedgrad.backends.launch_check import attention, products
from embedgrad.backends.launch_check.case import Case as LaunchCase
from embedgrad.backends.launch_check.check import Checked
from embedgrad.backends.reference import OPS as reference
from embedgrad.backends.triton import OPS as ours
from embedgrad.maths.optimizer import ADAMW
from embedgrad.maths.trust_region import MeanCosine

MOST_SECONDS, MARGIN = 600.0, 3.0  # for one folder; what is left to say how they went
EXAMPLES = 8  # drawn by each test
TYPES = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Types, and the largest relative error (Frobenius norm) against float64: some 4 of their roundings, sums of 1e4."""
SHAPE = Case(16, 24, 4)
NAMED = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|deselected)")


def run_tests(folder: str, limit: float, interpreted: bool, threads: int) -> Row:
    """The counts that pytest gives for one folder, within `limit` seconds."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0", "OMP_NUM_THREADS": "1",
                   "EMBEDGRAD_EXAMPLES": str(EXAMPLES)}  # fmt: skip
    command = [sys.executable, "-m", "pytest", folder, "-q", "-o", "addopts=", "-m", "not slow", "--no-header", "-rfE",
               "--tb=line", "-p", "no:cacheprovider"]  # fmt: skip
    if util.find_spec("xdist") is not None:
        command += ["-n", str(threads)]
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=limit
        )
        text = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode(errors="replace")
        text += f"\nERROR the tests were stopped after {limit:.0f} s"
    return row_of_tests(folder, text, time.monotonic() - started)


def row_of_tests(folder: str, text: str, seconds: float) -> Row:
    """The row that pytest's output gives."""
    summary = next((line for line in reversed(text.splitlines()) if NAMED.search(line)), "")
    counts = {name.rstrip("s") if name == "errors" else name: int(n) for n, name in NAMED.findall(summary)}
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if not counts and not failed:
        failed = ["ERROR " + (text.strip().splitlines() or ["pytest said nothing"])[-1]]
    return figure(
        "tests", "embedgrad", [float(counts.get("passed", 0))], {"folder": folder}, unit="tests", counted=True,
        seconds=seconds, failed=[line[:200] for line in failed], counts=counts,
    )  # fmt: skip


# ---- every kernel in every type --------------------------------------------------------------------------------------


def kernels() -> set[str]:
    """Every kernel of embedgrad/kernels, by name."""
    found = set()
    for module in iter_modules(embedgrad.kernels.__path__):
        for name, one in inspect.getmembers(import_module(f"embedgrad.kernels.{module.name}")):
            if name.endswith("_kernel") and not inspect.isfunction(one):
                found.add(kernel_name(one))
    return found


class _Launched:
    """Which kernels were launched inside."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._scope = launch.recorded(self._note)

    def _note(self, one: launch.Launch) -> bool:
        self.names.add(kernel_name(one[0]))
        return True

    def __enter__(self) -> _Launched:
        self._scope.__enter__()
        return self

    def __exit__(self, *stopped: Any) -> None:
        self._scope.__exit__(*stopped)


def _every_operation(bench: Bench, dtype: torch.dtype) -> list[Row]:
    """Every operation of the backend at a small size against the reference in float64."""
    model, where = bench.model(bench.first), bench.device.where
    tree = tree_of(model, SHAPE)
    errors: dict[str, float] = {}
    with _Launched() as seen:
        for one in cases(model.config, tree, dtype, where, [ours]):
            errors[one.name] = _worst(one.contenders[ours.name](), one.truth())
        attention = Attention(model.config, tree, SHAPE, where, dtype, [ours])
        forward, backward = attention.truth()
        errors["tree_attention"] = _worst(attention.forward[ours.name](), forward)
        errors["tree_attention_backward"] = _worst(attention.backward[ours.name](), backward)
        errors["prompt_step, mean cosine"] = _mean_cosine(bench)
        for name, case in _launch_cases(bench, dtype).items():
            errors[name] = _case_error(case, where)
    wrong = {name: error for name, error in errors.items() if not error <= TYPES[dtype]}
    return [figure(
        "kernels", "embedgrad", [max(errors.values())], {"dtype": str(dtype).removeprefix("torch.")}, version=OURS,
        unit="relative error", counted=True, errors=errors, wrong=wrong, launched=sorted(seen.names),
        never=sorted(kernels() - seen.names),
    )]  # fmt: skip


def _worst(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    return max(relative_error(x, y) for x, y in zip(found, truth, strict=True))


def _mean_cosine(bench: Bench) -> float:
    """The region that needs a pass over the whole prompt; float32 in every model."""
    e0, e, g = (bench.device.random(5, 48, dtype=torch.float32) for _ in range(3))
    found = e.clone(), torch.zeros_like(e), torch.zeros_like(e)
    truth = tuple(x.double() for x in found)
    region, factors = MeanCosine(0.9), ADAMW.factors(1, 1e-2)
    ours.prompt_step(found[0], e0, found[1], found[2], g, factors=factors, region=region)
    reference.prompt_step(truth[0], e0.double(), truth[1], truth[2], g.double(), factors=factors, region=region)
    return _worst(found, truth)


def _launch_cases(bench: Bench, dtype: torch.dtype) -> dict[str, LaunchCase]:
    """Operations that are not among those of `bench ops`."""
    found = {"decode_attention": attention.decode_attention(3, 21, 9, bench.sizes.heads[0], dtype)}
    for form in products.FORMS:
        found[f"dequantize, {form}"] = products.dequantize(96, 128, dtype, form)
        found[f"quantized_linear, {form}"] = products.quantized_linear(8, 96, 128, dtype, form)
        found[f"quantized_linear_backward, {form}"] = products.quantized_linear(8, 96, 128, dtype, form, backward=True)
    return found


def _case_error(case: LaunchCase, where: torch.device) -> float:
    checked = Checked(case, where)
    found, (_, truth) = checked.result(), checked.expected()
    return max(relative_error(found[name], truth[name]) for name in found)


def _jobs(bench: Bench) -> Iterator[Job]:
    for dtype in TYPES:
        if bench.device.interpreted and dtype == torch.bfloat16:
            continue  # Triton's interpreter gets its products wrong
        yield Job(f"every kernel in {dtype}", partial(_every_operation, bench, dtype), 15)


def _test_jobs(bench: Bench) -> Iterator[Job]:
    for folder, share in bench.sizes.tests:
        yield Job(folder, partial(_tested, bench, folder, share), 20, needs=("pytest", "hypothesis"))


def _tested(bench: Bench, folder: str, share: float) -> list[Row]:
    limit = min(MOST_SECONDS, (bench.until - time.time() - MARGIN) * share)
    return [run_tests(folder, limit, bench.device.interpreted, bench.threads)]


def _table(rows: Sequence[Row]) -> str:
    cells: list[Sequence[object]] = []
    for (dtype, at), found in grouped(rows, lambda one: str(one.case["dtype"])).items():
        one = found[-1]
        worst = max(one.more["errors"], key=lambda name: one.more["errors"][name])
        wrong = ", ".join(one.more["wrong"]) or "none"
        cells.append((dtype, at, len(one.more["launched"]), f"{one.median:.1e} ({worst})", wrong,
                      ", ".join(one.more["never"]) or "none"))  # fmt: skip
    heads = ("type", "commit", "kernels launched", "largest relative error", "wrong", "never launched")
    return table(heads, cells)


def _tests(rows: Sequence[Row]) -> str:
    cells: list[Sequence[object]] = []
    for (folder, at), found in grouped(rows, lambda one: str(one.case["folder"])).items():
        one = found[-1]
        counts = one.more["counts"]
        told = [counts.get(name, 0) for name in ("passed", "skipped", "failed")]
        cells.append((folder, at, *told, "<br>".join(one.more["failed"]) or None))
    return table(("tests", "commit", "passed", "skipped", "failed", "which failed"), cells)


SECTION = Section("kernels", "Is every kernel right in every type?", 45, _jobs, _table)
TESTS = Section("tests", "Do the tests pass, compiled for this card?", 100, _test_jobs, _tests)
