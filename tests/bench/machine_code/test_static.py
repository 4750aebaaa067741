"""What the compiler makes of the kernels stays within its limits, on targets that are not here.

The bench runs in a process of its own, because Triton decides when it is imported whether it interprets or compiles.
"""

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from embedgrad.kernels.launch_row import Row as LaunchRow
from embedgrad.kernels.launch_table import ROWS, SHARED_LIMIT

from bench.harness.accelerators import ACCELERATORS, LIMITS, occupancy
from bench.harness.rows import ROOT, Row, row
from bench.machine_code.reading import MachineCode
from bench.machine_code.static import ARCHES, violations


def run_bench(folder: Path, *options: str) -> list[Row]:
    out = folder / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "kernels", *options, "--unchecked", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Row.model_validate(one) for one in json.loads(out.read_text())]


def static(rows: list[Row]) -> list[Row]:
    return [one for one in rows if one.case["part"] == "static"]


@pytest.fixture(scope="module")
def quick_rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return static(run_bench(tmp_path_factory.mktemp("static"), "--static", "--quick"))


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return static(run_bench(tmp_path_factory.mktemp("static"), "--static", "--every"))


def kernel_names() -> set[str]:
    """Every `@triton.jit` function of kernels/ whose name says that it is launched."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "kernels").glob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if f.name.endswith("_kernel")}


def test_limits_quick(quick_rows: list[Row]) -> None:
    assert not violations(quick_rows)


def test_costs_are_bounded_below(quick_rows: list[Row]) -> None:
    """What the tiles ask for and do is never less than what the result needs."""
    for one in quick_rows:
        assert one.more["moved_bytes"] >= one.more["least_bytes"] > 0, one.case["specimen"]
        assert one.more["done_operations"] >= one.more["useful_operations"] >= 0, one.case["specimen"]


def test_every_kernel_is_compiled(quick_rows: list[Row]) -> None:
    assert kernel_names() <= {one.contender for one in quick_rows}


@pytest.mark.slow
def test_limits_everywhere(all_rows: list[Row]) -> None:
    assert not violations(all_rows)


@pytest.mark.slow
def test_every_row_of_the_launch_table_is_compiled(all_rows: list[Row]) -> None:
    """A written row may be hidden by rows that were tuned for its kernel and architecture."""
    tuned = [entry for entry in ROWS if entry.tuned is not None]

    def may_be_hidden(entry: LaunchRow, arch: str) -> bool:
        rivals = [one for one in tuned if fnmatchcase(one.kernel, entry.kernel) and fnmatchcase(arch, one.arch)]
        return entry.tuned is None and bool(rivals)

    used = {(one.case["arch"], i) for one in all_rows for i in one.more["table_rows"]}
    wanted = {
        (arch, i) for i, entry in enumerate(ROWS) for arch in ARCHES
        if fnmatchcase(arch, entry.arch) and not may_be_hidden(entry, arch)
    }  # fmt: skip
    assert not [(arch, ROWS[i]) for arch, i in sorted(wanted - used)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 3}, "3 spills"),
        ({"shared": 70000}, "70000 bytes of shared memory"),
        ({"occupancy": 0.0}, "not even one block"),
        ({"matrix": {}}, "no matrix instruction"),
        ({"vector_loads": 0.4}, "40% of the bytes"),
    ],
)
def test_a_broken_limit_is_named(change: dict[str, Any], message: str) -> None:
    fine = {"spills": 0, "shared": 65536, "shared_limit": 65536, "occupancy": 0.5, "needs_matrix": True,
            "matrix": {"mfma": 1}, "needs_vector_loads": True, "vector_loads": 0.9}  # fmt: skip

    def sentences(more: dict[str, Any]) -> list[str]:
        return violations([row("kernels", "k", "1", [8], case={"specimen": "s", "arch": "gfx942"}, **more)])

    assert not sentences(fine)
    (sentence,) = sentences({**fine, **change})
    assert message in sentence


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        ("sm_80", 64, 0, 4, 0.5),  # 65,536 registers / (64 · 32) = 32 warps of 64
        ("sm_80", 32, 0, 8, 1.0),
        ("sm_80", 255, 0, 4, 0.125),
        ("sm_90", 32, 100 << 10, 4, 2 * 4 / 64),  # two blocks of 101 KiB in 228 KiB
        ("sm_90", 32, 228 << 10, 4, 0.0),
        ("gfx942", 128, 0, 4, 0.5),  # 512 / 128 = 4 wavefronts of 8 on each SIMD
        ("gfx942", 60, 32 << 10, 4, 2 * 4 / 32),
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, warps: int, expected: float) -> None:
    assert occupancy(arch, registers, shared, warps) == expected


def test_vector_loads_counts_bytes() -> None:
    code = MachineCode(registers=1, spills=0, shared=0, loads=Counter({128: 3, 32: 4}))
    assert code.vector_loads == 0.75


def test_accelerators_and_limits_agree() -> None:
    assert {a.arch for a in ACCELERATORS} == set(LIMITS) == set(ARCHES)
    assert {arch: limits.shared_block for arch, limits in LIMITS.items()} == SHARED_LIMIT
