"""Two network namespaces as two machines: torchrun meets across them, one of them dies, and the run goes on.

Each machine has its own folder with the model, the data and the configuration, as without a shared file system; its
own loopback; and one cable to the other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launched import ROOT, ends, result, start, wait_for_lines, write_task

pytestmark = pytest.mark.slow
SECONDS = 20  # in which the other machine must have ended where one dies
SILENCE = 60  # the same where one vanishes without a word


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Host:
    """A machine: its namespace, its end of the cable with an address, and its folder."""

    namespace: str
    cable: str
    address: str
    folder: Path

    def pids(self) -> list[int]:
        """The processes that run on it."""
        found = subprocess.run(["ip", "netns", "pids", self.namespace], check=True, capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def kill(self) -> None:
        """End all its processes at once, as a kernel that dies and closes its connections."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def pull_the_cable(self) -> None:
        """Let the machine vanish without a word."""
        _ip("-n", self.namespace, "link", "set", self.cable, "down")

    def plug_in(self) -> None:
        """Connect it again."""
        _ip("-n", self.namespace, "link", "set", self.cable, "up")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    """Two machines at 10.213.7.1 and 10.213.7.2."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` (iproute2), which makes network namespaces")
    tag = os.getpid() % 100_000
    made = tuple(
        Host(f"embedgrad-{tag}-{i}", f"eg{tag}-{i}", f"10.213.7.{i + 1}", tmp_path_factory.mktemp(f"host{i}"))
        for i in range(2)
    )
    with contextlib.ExitStack() as stack:
        try:
            for host in made:
                _ip("netns", "add", host.namespace)
                stack.callback(_ip, "netns", "del", host.namespace)
                stack.callback(host.kill)
            first, second = made
            _ip("link", "add", first.cable, "netns", first.namespace, "type", "veth", "peer", "name", second.cable,
                "netns", second.namespace)  # fmt: skip
            for host in made:
                _ip("-n", host.namespace, "link", "set", "lo", "up")
                _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.cable)
                host.plug_in()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        for host in made:
            write_task(host.folder)
        yield first, second


def launch(
    hosts: tuple[Host, Host], folder: str, *more: str, torchrun: tuple[str, ...] = ()
) -> list[subprocess.Popen[str]]:
    """A run of two ranks, one on each machine; torchrun on both. They have the same name, so each is told its address,
    which real machines find out by their names."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", host.namespace, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
             "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:29400",
             "--rdzv-id", folder, "--rdzv-conf", f"is_host={int(host is hosts[0])}", "--local-addr", host.address,
             *torchrun,
             "-m", "embedgrad", "optimize", "run.yaml", "-q", "--set", f"run.folder={folder}", *more],
            cwd=host.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
            start_new_session=True,
        )
        for host in hosts
    ]  # fmt: skip


def home_of(hosts: tuple[Host, Host], folder: str) -> Path:
    """The folder of the machine with rank 0, as torchrun decided. The other has no run folder."""
    (found,) = [host.folder for host in hosts if (host.folder / folder).exists()]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An undisturbed run of two ranks on one machine."""
    work = write_task(tmp_path_factory.mktemp("one-host"))
    command = ("-m", "embedgrad", "optimize", "run.yaml", "-q", "--set", "run.folder=whole")
    assert [code for code, _, _ in ends(start(2, *command, cwd=work))] == [0, 0]
    return result(work, "whole")


def go_on(hosts: tuple[Host, Host], folder: str) -> dict[str, Any]:
    """The result after --resume on both machines."""
    found = ends(launch(hosts, folder, "--resume"))
    assert [code for code, _, _ in found] == [0, 0], found
    return result(home_of(hosts, folder), folder)


def test_two_hosts_give_the_bits_of_one(hosts: tuple[Host, Host], whole: dict[str, Any]) -> None:
    found = ends(launch(hosts, "undisturbed"))
    assert [code for code, _, _ in found] == [0, 0], found
    assert result(home_of(hosts, "undisturbed"), "undisturbed") == whole


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_host_ends_the_other(victim: int, hosts: tuple[Host, Host], whole: dict[str, Any]) -> None:
    """Also the one where torchrun's processes meet."""
    folder = f"killed-{victim}"
    processes = launch(hosts, folder)
    wait_for_lines([host.folder for host in hosts], folder, 20, processes)
    hosts[victim].kill()
    killed = time.monotonic()
    found = ends(processes, SECONDS)
    assert time.monotonic() - killed < SECONDS, found
    code, _, said = found[1 - victim]
    assert code != 0
    assert said.count("embedgrad:") == 1, said
    assert hosts[1 - victim].pids() == []
    assert go_on(hosts, folder) == whole


def test_a_killed_process_is_started_again_by_torchrun(hosts: tuple[Host, Host], whole: dict[str, Any]) -> None:
    processes = launch(hosts, "restarted", torchrun=("--max-restarts", "1"))
    wait_for_lines([host.folder for host in hosts], "restarted", 20, processes)
    (worker,) = [pid for pid in hosts[1].pids() if pid != processes[1].pid]
    os.kill(worker, signal.SIGKILL)
    found = ends(processes)
    assert [code for code, _, _ in found] == [0, 0], found
    assert result(home_of(hosts, "restarted"), "restarted") == whole


def test_a_host_that_vanishes_without_a_word(hosts: tuple[Host, Host], whole: dict[str, Any]) -> None:
    """Both processes of the run end. torchrun itself tries for longer to reach the other machine."""
    processes = launch(hosts, "vanished")
    wait_for_lines([host.folder for host in hosts], "vanished", 20, processes)
    launchers = {process.pid for process in processes}
    hosts[1].pull_the_cable()
    until = time.monotonic() + SILENCE
    try:
        while any(set(host.pids()) - launchers for host in hosts):
            assert time.monotonic() < until, "a process of the run waits for the machine that has vanished"
            time.sleep(0.2)
    finally:
        for host in hosts:
            host.kill()
        hosts[1].plug_in()
    found = ends(processes)
    assert all(said.count("embedgrad:") == 1 for _, _, said in found), found
    assert go_on(hosts, "vanished") == whole
