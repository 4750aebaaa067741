"""Who a process is, by the variables of its launcher."""

from __future__ import annotations

import pytest

from embedgrad.distributed.join import gpu_of
from embedgrad.distributed.network import interface_to
from embedgrad.distributed.place import Place, find_place, first_host
from embedgrad.util.errors import ConfigError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "one", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
SRUN |= {"SLURM_STEP_NODELIST": "gpu[007-010,12],login"}


def test_torchrun() -> None:
    assert find_place(TORCHRUN) == Place(3, 4, 1, "one", 29500)
    assert find_place({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}) == Place(3, 4, 1, "one", 29500, 2)


def test_srun_and_torchrun_under_srun() -> None:
    assert find_place(SRUN) == Place(5, 8, 1, "gpu007", 20077)
    assert find_place({**SRUN, "MASTER_ADDR": "two", "MASTER_PORT": "1234"}) == Place(5, 8, 1, "two", 1234)
    assert find_place({**SRUN, **TORCHRUN}) == Place(3, 4, 1, "one", 29500)


def test_srun_that_does_not_say_where() -> None:
    without = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}
    found = find_place({**without, "SLURM_JOB_NODELIST": "n[3-4]", "SLURM_NODELIST": "other"})
    assert found is not None
    assert found.address == "n3"
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        find_place(without)
    with pytest.raises(ConfigError, match="SLURM_PROCID is 'x'"):
        find_place({**SRUN, "SLURM_PROCID": "x"})


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script, not a step of several tasks
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_alone(alone: dict[str, str]) -> None:
    assert find_place(alone) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"RANK": ""}, "RANK is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"RANK": "4"}, "from 0 to 3"),
        ({"WORLD_SIZE": "four"}, "whole number"),
        ({"WORLD_SIZE": "0"}, "at least 1"),
        ({"MASTER_PORT": "99999999999"}, "port"),
    ],
)
def test_variables_that_do_not_fit(changes: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        find_place({**TORCHRUN, **changes})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[1-4]", "n1"), ("n[08,11-12]-ib,m", "n08-ib"), ("", ""), ("h-1,h-2", "h-1")],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_gpus() -> None:
    assert [gpu_of(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert gpu_of(3, 1) == 0  # the launcher shows each process its own
    with pytest.raises(ConfigError, match="one process for each GPU"):
        gpu_of(2, 2)


def test_the_loopback_is_no_way_to_other_machines() -> None:
    assert interface_to("127.0.0.1", 9, beyond=False) == "lo"
    assert interface_to("127.0.0.1", 9, beyond=True) != "lo"
