"""Connects the processes that a launcher has started."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any

import torch

from embedgrad.distributed import lifeline
from embedgrad.distributed.network import interface_to
from embedgrad.distributed.place import Place, find_place
from embedgrad.distributed.ranks import ALONE, Group, Ranks
from embedgrad.util.errors import ConfigError, EmbedGradError, SaveError
from embedgrad.util.files import write_atomic

_MEETING = 300.0  # seconds in which all processes must have come
_EXCHANGE = 1800.0  # seconds that an exchange may wait for the slowest rank; a dead one is noticed much earlier


def join() -> Ranks:
    """This process among those that torchrun or srun has started; ALONE where there is no launcher.

    On a machine with NVIDIA GPUs each process gets the one of its local rank, and CUDA tensors are exchanged by NCCL;
    all else goes over Gloo. Raises ConfigError (variables of the launcher that do not fit, more processes than GPUs)
    and EmbedGradError (the others cannot be reached).
    """
    place = find_place()
    if place is None:
        return ALONE
    gpus = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    if gpus:
        torch.cuda.set_device(gpu_of(place.local_rank, torch.cuda.device_count()))
    _meet_on_the_network(place)
    store = _store(place)
    line, token = _lifeline(place, store)
    store = torch.distributed.PrefixStore(f"embedgrad/{token}", store)  # it may hold what earlier attempts have left
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    try:
        torch.distributed.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.size, timeout=datetime.timedelta(seconds=_EXCHANGE)
        )
    except (RuntimeError, ValueError) as error:
        raise EmbedGradError(
            f"the {place.size} processes cannot be connected: {str(error).splitlines()[0]}; start all of them, with a "
            "network between their machines (GLOO_SOCKET_IFNAME names the interface to use)."
        ) from error
    ranks = Group(place, store, line)
    ranks.restarted = ranks.any(place.attempt > 0)  # torchrun counts on each machine for itself
    if gpus:
        _check_gpus(ranks)
    return ranks


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks, for one task. An error that leaves the block ends all of them, and one of them reports it."""
    try:
        ranks = join()
        with ranks.speaking():
            yield ranks
    except EmbedGradError as error:
        _tell_launcher(error)
        raise
    ranks.leave()


def _tell_launcher(error: EmbedGradError) -> None:
    """Leave the sentence for torchrun, whose list of failed processes shows a link to its manual otherwise."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": {"message": str(error), "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(SaveError):
            write_atomic(path, json.dumps(content).encode())


def gpu_of(local_rank: int, count: int) -> int:
    """The GPU of a process among the `count` that it sees. A launcher may show each process its own one only."""
    if local_rank < count:
        return local_rank
    if count == 1:
        return 0
    raise ConfigError(
        f"this machine shows {count} GPUs, but a process has local rank {local_rank}; start one process for each GPU, "
        "or hide the GPUs (CUDA_VISIBLE_DEVICES=) to compute on CPUs."
    )


def _meet_on_the_network(place: Place) -> None:
    """Choose Gloo's interface where the user has not."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "0"
    found = interface_to(place.address, place.port, beyond=here != str(place.size))
    if found is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = found


def _store(place: Place) -> Any:
    """The key-value store that all processes share: torchrun's, or one that rank 0 holds."""
    os.environ.update(
        RANK=str(place.rank), WORLD_SIZE=str(place.size), MASTER_ADDR=place.address, MASTER_PORT=str(place.port)
    )
    meeting = torch.distributed.rendezvous("env://", timeout=datetime.timedelta(seconds=_MEETING))
    try:
        store, _, _ = next(iter(meeting))
    except (RuntimeError, ValueError, OSError) as error:
        raise EmbedGradError(
            f"the {place.size} processes cannot meet at {place.address}, port {place.port}: "
            f"{str(error).splitlines()[0]}; start all of them, and choose a free MASTER_PORT."
        ) from error
    store.set_timeout(datetime.timedelta(seconds=_MEETING))
    return store


def _lifeline(place: Place, store: Any) -> tuple[lifeline.Lifeline, str]:
    """(this process's lifeline, what names this attempt and no other). All processes of the attempt have come.

    It comes before all else, so that a process that dies while the others connect ends them too.
    """
    if place.rank == 0:
        token, server = secrets.token_hex(16), lifeline.listen(place.address)
        store.set("embedgrad/lifeline", f"{server.getsockname()[1]} {token}")
        return lifeline.accept(server, place.size - 1, token, _MEETING), token
    until = time.monotonic() + _MEETING
    while True:  # the store may still hold the address of an attempt whose rank 0 has died
        try:
            port, token = store.get("embedgrad/lifeline").decode().split()
        except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
            raise EmbedGradError(
                f"rank 0 has not come to {place.address}, port {place.port}; start all {place.size} processes."
            ) from error
        try:
            return lifeline.connect(place.address, int(port), token), token
        except EmbedGradError:
            if time.monotonic() > until:
                raise
        time.sleep(0.2)


def _check_gpus(ranks: Ranks) -> None:
    """Raises ConfigError where two processes share a GPU, which NCCL cannot connect."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    own = [socket.gethostname(), str(getattr(properties, "uuid", torch.cuda.current_device()))]
    all_of_them = ranks.gather(own)
    for rank, place in enumerate(all_of_them):
        if place in all_of_them[:rank]:
            raise ConfigError(
                f"ranks {all_of_them.index(place)} and {rank} would share a GPU of {place[0]}; start one process for "
                "each GPU, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to compute on CPUs."
            )
