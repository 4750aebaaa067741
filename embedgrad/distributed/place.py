"""Which of several processes this one is, by the variables that torchrun or srun sets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from embedgrad.util.errors import ConfigError

_FIRST_PORT, _PORTS = 20000, 20000  # below the ports that systems give to outgoing connections

_NODES = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")  # the first that is set counts


@dataclass(frozen=True)
class Place:
    """Where this process stands.

    rank: its number among `size` processes. local_rank: its number on this machine. address, port: where the processes
    meet. attempt: how often the launcher has started the processes again after one of them died.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    attempt: int = 0


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that the launcher gave this process; None where it works alone. Raises ConfigError.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Under srun the same variables count where
    they are set; else SLURM's own do, and the processes meet on the step's first machine.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _by_torchrun(environment)
    if _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in environment:
        return _by_srun(environment)
    return None


def _by_torchrun(environment: Mapping[str, str]) -> Place | None:
    size = _number(environment, "WORLD_SIZE", 1)
    if size < 1:
        raise ConfigError(f"WORLD_SIZE is {size}, but should be the number of processes, at least 1.")
    if size == 1:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start the processes with torchrun, or set it."
        )
    rank = _number(environment, "RANK", 0)
    return _checked(
        Place(
            rank, size, _number(environment, "LOCAL_RANK", rank), environment["MASTER_ADDR"],
            _number(environment, "MASTER_PORT", 0), _number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
        )
    )  # fmt: skip


def _by_srun(environment: Mapping[str, str]) -> Place:
    job = _number(environment, "SLURM_JOB_ID", 0) + _number(environment, "SLURM_STEP_ID", 0)
    nodes = next((environment[name] for name in _NODES if environment.get(name)), "")
    address = environment.get("MASTER_ADDR") or first_host(nodes)
    if not address:
        raise ConfigError(f"{_NODES[0]} names no machine; set MASTER_ADDR to the address of the first one.")
    return _checked(
        Place(
            _number(environment, "SLURM_PROCID", 0),
            _number(environment, "SLURM_STEP_NUM_TASKS", 1),
            _number(environment, "SLURM_LOCALID", 0),
            address,
            _number(environment, "MASTER_PORT", _FIRST_PORT + job % _PORTS),
            _number(environment, "SLURM_RESTART_COUNT", 0),
        )
    )


def first_host(nodes: str) -> str:
    """The first machine of a list as SLURM writes it: "gpu[07-09,12],login" gives "gpu07"."""
    found = re.match(r"([^,\[]+)(?:\[([0-9]+)[^\]]*\])?([^,\[]*)", nodes)
    return "" if found is None else found[1] + (found[2] or "") + found[3]


def _checked(place: Place) -> Place:
    if not 0 <= place.rank < place.size:
        raise ConfigError(f"the rank is {place.rank}, but should be from 0 to {place.size - 1}.")
    if not 0 < place.port < 1 << 16:
        raise ConfigError(f"MASTER_PORT is {place.port}, but should be the number of a port.")
    return place


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise ConfigError(f"{name} is {text[:40]!r}, but should be a whole number.")
    return int(text)
