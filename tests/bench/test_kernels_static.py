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
from embedgrad.kernels.launch_table import ROWS, SHARED_LIMIT

from bench.kernels_static import ARCHES, violations
from bench.machine_code import MachineCode
from bench.machines import LIMITS, MACHINES, occupancy

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


def run_bench(folder: Path, *options: str) -> list[Row]:
    out = folder / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "kernels", *options, "--unchecked", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [row for row in json.loads(out.read_text()) if row["case"]["part"] == "static"]
    return [{**row["case"], **row["more"], "kernel": row["contender"], "registers": row["median"]} for row in rows]


@pytest.fixture(scope="module")
def quick_rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return run_bench(tmp_path_factory.mktemp("static"), "--static", "--quick")


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return run_bench(tmp_path_factory.mktemp("static"), "--static", "--every")


def kernel_names() -> set[str]:
    """Every `@triton.jit` function of kernels/ whose name says that it is launched."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "kernels").glob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if f.name.endswith("_kernel")}


def test_limits_quick(quick_rows: list[Row]) -> None:
    assert not violations(quick_rows)


def test_costs_are_bounded_below(quick_rows: list[Row]) -> None:
    """What the tiles ask for and do is never less than what the result needs."""
    for row in quick_rows:
        assert row["moved_bytes"] >= row["least_bytes"] > 0, row["specimen"]
        assert row["done_operations"] >= row["useful_operations"] >= 0, row["specimen"]


def test_every_kernel_is_compiled(quick_rows: list[Row]) -> None:
    assert kernel_names() <= {row["kernel"] for row in quick_rows}


@pytest.mark.slow
def test_limits_everywhere(all_rows: list[Row]) -> None:
    assert not violations(all_rows)


@pytest.mark.slow
def test_every_row_of_the_launch_table_is_compiled(all_rows: list[Row]) -> None:
    used = {(row["arch"], i) for row in all_rows for i in row["table_rows"]}
    wanted = {(arch, i) for i, row in enumerate(ROWS) for arch in ARCHES if fnmatchcase(arch, row.arch)}
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
def test_a_broken_limit_is_named(change: Row, message: str) -> None:
    fine = {
        "specimen": "s", "kernel": "k", "arch": "gfx942", "spills": 0, "shared": 65536, "shared_limit": 65536,
        "occupancy": 0.5, "needs_matrix": True, "matrix": {"mfma": 1}, "needs_vector_loads": True, "vector_loads": 0.9,
    }  # fmt: skip
    assert not violations([fine])
    (sentence,) = violations([{**fine, **change}])
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


def test_machines_and_limits_agree() -> None:
    assert {m.arch for m in MACHINES} == set(LIMITS) == set(ARCHES)
    assert {arch: limits.shared_block for arch, limits in LIMITS.items()} == SHARED_LIMIT
