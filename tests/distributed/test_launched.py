"""Real processes: what they write, how they end when one is killed or stopped, and what they say."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launched import ROOT, ends, result, start, wait_for_lines, write_task

SECONDS = 20  # in which the others must have ended


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("ranks"))


def begin(work: Path, folder: str, size: int = 2, *more: str, restarted: bool = False) -> list[subprocess.Popen[str]]:
    command = ("-m", "embedgrad", "optimize", "run.yaml", "-q", "--set", f"run.folder={folder}", *more)
    return start(size, *command, restarted=restarted, cwd=work)


def torchrun(work: Path, *more: str) -> subprocess.Popen[str]:
    """The run on two ranks, started by torchrun in a process group of its own."""
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "embedgrad", "optimize")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *command, "run.yaml", "-q", *more], cwd=work, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(work: Path) -> dict[str, Any]:
    """An undisturbed run of two ranks."""
    assert [code for code, _, _ in ends(begin(work, "whole"))] == [0, 0]
    return result(work, "whole")


def killed_and_resumed(work: Path, folder: str, victim: int, lines: int, by_restart: bool) -> None:
    processes = begin(work, folder)
    wait_for_lines([work], folder, lines, processes)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    found = ends(processes, SECONDS)
    assert time.monotonic() - killed < SECONDS, found
    code, _, said = found[1 - victim]
    if code != 0:  # else the run had come to its end
        assert code == 2
        assert said.count("embedgrad:") == 1
        assert "Traceback" not in said
    again = begin(work, folder, 2, *([] if by_restart else ["--resume"]), restarted=by_restart)
    assert [code for code, _, _ in ends(again)] == [0, 0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_and_nothing_is_lost(victim: int, work: Path, whole: dict[str, Any]) -> None:
    killed_and_resumed(work, f"killed-{victim}", victim, 20 + victim, by_restart=victim == 1)
    assert result(work, f"killed-{victim}") == whole


@pytest.mark.slow
def test_ranks_killed_at_twenty_moments(work: Path, whole: dict[str, Any]) -> None:
    draw = random.Random(0)
    for moment in range(20):
        killed_and_resumed(work, f"moment-{moment}", draw.randrange(2), draw.randrange(66), by_restart=moment % 2 == 0)
        assert result(work, f"moment-{moment}") == whole, moment


def test_ctrl_c_saves_and_the_run_goes_on(work: Path, whole: dict[str, Any]) -> None:
    processes = begin(work, "stopped")
    wait_for_lines([work], "stopped", 15, processes)
    for process in processes:
        for _ in range(2):  # launchers send it more than once
            os.kill(process.pid, signal.SIGINT)
    found = ends(processes)
    assert [code for code, _, _ in found] == [130, 130], found
    assert sum("all of it saved" in said for _, _, said in found) == 1
    assert [code for code, _, _ in ends(begin(work, "stopped", 2, "--resume"))] == [0, 0]
    assert result(work, "stopped") == whole


@pytest.mark.parametrize("whole_group", [True, False], ids=["a terminal's", "the launcher alone"])
def test_ctrl_c_to_torchrun_saves(whole_group: bool, work: Path, whole: dict[str, Any]) -> None:
    folder = f"torchrun-{whole_group}"
    launcher = torchrun(work, "--set", f"run.folder={folder}")
    try:
        wait_for_lines([work], folder, 15, [launcher])
        (os.killpg if whole_group else os.kill)(launcher.pid, signal.SIGINT)
        _, said = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
    assert said.count("all of it saved") == 1, said
    assert [code for code, _, _ in ends(begin(work, folder, 2, "--resume"))] == [0, 0]
    assert result(work, folder) == whole


def test_srun_starts_the_same_run(work: Path, whole: dict[str, Any]) -> None:
    command = ("-m", "embedgrad", "optimize", "run.yaml", "-q", "--set", "run.folder=srun")
    found = ends(start(2, *command, cwd=work, srun=True))
    assert [code for code, _, _ in found] == [0, 0], found
    assert result(work, "srun") == whole


def test_torchrun_shows_the_sentence(work: Path) -> None:
    launcher = torchrun(work, "--set", "model.path=nowhere")
    _, said = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert "traceback : nowhere" in said, said
    assert "To enable traceback see" not in said
    assert said.count("Traceback") <= 1  # torchrun's own


def test_an_error_is_said_once(work: Path, whole: dict[str, Any]) -> None:
    for more in (["--set", "run.folder=whole"], ["--set", "model.path=nowhere"]):
        found = ends(begin(work, "other", 2, *more))
        assert [code for code, _, _ in found] == [2, 2], found
        said = [line for _, _, err in found for line in err.splitlines() if line.startswith("embedgrad:")]
        assert len(said) == 1, found
