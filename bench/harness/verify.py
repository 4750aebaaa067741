"""No figure without a right result: the tests of what a question times, run before it times anything."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

from bench.harness.rows import ROOT


def verify(tests: Iterable[str]) -> None:
    """Run these tests (pytest ids). SystemExit, and so no figure, where one fails or does not exist."""
    wanted = sorted(set(tests))
    if not wanted:
        return
    print(f"checking first: {', '.join(wanted)}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *wanted]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{found.stdout}{found.stderr}\nthe tests of what is timed do not pass: no figure.")
    print(found.stdout.strip().splitlines()[-1], flush=True)
