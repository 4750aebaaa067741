"""A small run for several processes, and these started as a launcher does: by the variables that torchrun sets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.model.tiny import write_folder
from tests.train.training import outcome

ROOT = Path(__file__).parents[2]
CONFIG = """
model: {path: tiny, dtype: float32, device: cpu}
prompt: Say what it is.
data: {path: data.jsonl, labels: [positive, negative], split: {train: 13, validation: 7, test: 7}}
optimize: {steps: 60, batch_size: 5, learning_rate: 2e-2, validate_every: 9, checkpoint_every: 2, select_by: loss,
           trust_region: {kind: cosine, tau: 0.8}}
"""


def write_task(folder: Path) -> Path:
    """A tiny model, its data and run.yaml in `folder`."""
    write_folder(folder / "tiny")
    rows = [
        {"query": f"A film of {('joy', 'pain')[i % 2]}, number {i} " + "and so on " * (i % 4),
         "target": ("positive", "negative")[i % 2]} for i in range(29)
    ]  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(CONFIG)
    return folder


def result(work: Path, folder: str) -> dict[str, Any]:
    """What the run in `work`/`folder` has given, without what depends on the moment."""
    found = outcome(work / folder / "run")
    del found["files"]
    found["summary"].pop("peak_memory_bytes")
    return found


def wait_for_lines(homes: Sequence[Path], folder: str, count: int, processes: list[subprocess.Popen[str]]) -> None:
    """Wait until the run's metrics, in one of `homes`, have more than `count` lines."""
    metrics = [home / folder / "run" / "metrics.jsonl" for home in homes]
    while not any(path.exists() and path.read_bytes().count(b"\n") > count for path in metrics):
        assert all(process.poll() in (None, 0) for process in processes), ends(processes, 5)
        time.sleep(0.005)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def start(
    size: int, *command: str, restarted: bool = False, cwd: Path | None = None, srun: bool = False
) -> list[subprocess.Popen[str]]:
    """`python COMMAND` as ranks 0 to size − 1, in sessions of their own. srun: by the variables that srun sets."""
    port = str(free_port())
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": port}
    if srun:
        common |= {"SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "7"}
        common |= {"SLURM_NTASKS_PER_NODE": str(size), "SLURM_RESTART_COUNT": str(int(restarted))}
        own = ("SLURM_PROCID", "SLURM_LOCALID")
    else:
        common |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        common |= {"TORCHELASTIC_RESTART_COUNT": str(int(restarted))}
        own = ("RANK", "LOCAL_RANK")
    return [
        subprocess.Popen(
            [sys.executable, *command], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **common, **dict.fromkeys(own, str(rank))}, start_new_session=True,
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
