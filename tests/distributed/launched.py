"""Starts several processes as a launcher does, by the variables that torchrun sets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def start(size: int, *command: str, restarted: bool = False, cwd: Path | None = None) -> list[subprocess.Popen[str]]:
    """`python COMMAND` as ranks 0 to size − 1, in sessions of their own."""
    port = str(free_port())
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    common |= {"TORCHELASTIC_RESTART_COUNT": str(int(restarted))}
    return [
        subprocess.Popen(
            [sys.executable, *command], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def ends(processes: list[subprocess.Popen[str]], seconds: float = 120) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; kills what does not end in time."""
    found = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            err += "\n(did not end in time)"
        found.append((process.returncode, out, err))
    return found
