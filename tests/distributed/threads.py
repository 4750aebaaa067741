"""Ranks that are threads of one process, each with a model of its own: as fast as a test with many draws needs them."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from embedgrad.distributed.ranks import Ranks
from embedgrad.engine.model import Model, load_model
from embedgrad.util.errors import EmbedGradError, ToldElsewhere
from tests.train.training import model_folder

T = TypeVar("T")


@functools.cache
def model_of(rank: int) -> Model:
    """The tiny model; each rank has one of its own."""
    return load_model(model_folder(), device="cpu")


class _Table:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.places: list[Any] = [None] * size


class ThreadRanks(Ranks):
    """One of `size` threads. Values go through JSON, as between processes."""

    def __init__(self, rank: int, size: int, table: _Table) -> None:
        self.rank, self.size, self._table = rank, size, table

    def _exchange(self, value: Any) -> list[Any]:
        self._table.places[self.rank] = value
        self._table.barrier.wait()
        found = list(self._table.places)
        self._table.barrier.wait()
        return found

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(each) for each in self._exchange(json.dumps(value))]

    def share(self, data: bytes | None) -> bytes | None:
        first: bytes | None = self._exchange(data)[0]
        return first

    def gather_tensors(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x.clone()))

    def only_first(self, work: Callable[[], T]) -> T | None:
        error, result = None, None
        if self.leads:
            try:
                result = work()
            except EmbedGradError as raised:
                error = raised
        told = self.share(None if error is None else str(error).encode())
        if error is not None:
            raise error
        if told:
            raise ToldElsewhere(told.decode())
        return result


def on_ranks(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """What `work` returns on each of `size` ranks; raises the first rank's error."""
    for rank in range(size):
        model_of(rank)  # opened before there are threads
    table, results, errors = _Table(size), [None] * size, [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, size, table))
        except BaseException as error:
            errors[rank] = error
            time.sleep(0.5)  # lets the others leave a barrier that all have reached
            table.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = [error for error in errors if error is not None]
    if told:
        raise min(told, key=lambda error: isinstance(error, (threading.BrokenBarrierError, ToldElsewhere)))
    return results
