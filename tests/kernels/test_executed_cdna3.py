"""The kernels' MI300X machine code, executed in an emulator, against the fp64 reference; bf16 included.

Runs where TINYGRAD_REPO names a checkout of tinygrad (it holds the emulator), in a process of its own, because Triton
decides when it is imported whether it interprets or compiles.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cdna3
from bench.specimens import trials

ROOT = Path(__file__).parents[2]
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
ALL = [(t.name, NAMES[dtype]) for t in trials() for dtype in t.types]
QUICK = {t.op: (t.name, NAMES[t.types[0]]) for t in reversed(trials())}
Row = dict[str, Any]

pytestmark = [
    pytest.mark.skipif(cdna3.unavailable() is not None, reason=str(cdna3.unavailable())),
    pytest.mark.needs_no_launch,
]


def executed(folder: Path, *options: str) -> dict[tuple[str, str], Row]:
    out = folder / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "kernels", "--executed", *options, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {(row["trial"], row["dtype"]): row for row in json.loads(out.read_text())["rows"]}


@pytest.fixture(scope="module")
def quick_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Row]:
    return executed(tmp_path_factory.mktemp("executed"), "--quick")


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Row]:
    return executed(tmp_path_factory.mktemp("executed"))


def check(row: Row) -> None:
    assert row["right"], f"{row['output']}: error {row['error']:.3e}, allowed {row['allowed']:.3e}"
    assert row["global"] > 0  # it did run
    if row["useful_operations"]:
        assert row["matrix"] > 0


@pytest.mark.parametrize("op", QUICK)
def test_one_case_of_each(op: str, quick_rows: dict[tuple[str, str], Row]) -> None:
    check(quick_rows[QUICK[op]])


@pytest.mark.slow
@pytest.mark.parametrize(("trial", "dtype"), ALL)
def test_every_type_and_case(trial: str, dtype: str, all_rows: dict[tuple[str, str], Row]) -> None:
    check(all_rows[trial, dtype])
