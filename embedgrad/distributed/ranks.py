"""What several processes (ranks) of one task exchange: values as JSON, tensors as bytes, errors once.

Every method that exchanges is called by all ranks in the same order. Nothing is pickled. Sums are made by whoever
gathers, in the order of the ranks, so that all ranks get the same bits.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from embedgrad.distributed.lifeline import Lifeline
from embedgrad.distributed.place import Place
from embedgrad.util.errors import EmbedGradError, RankLost, ToldElsewhere

# Torch 2.13 has another name for it.
_all_gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
T = TypeVar("T")
_GRACE = 3.0  # seconds in which the others may report why they ended
_ERRORS = 1.0  # seconds in which the others may meet the same error as rank 0


class Ranks:
    """This process among `size`. With one process every exchange returns what was given."""

    rank = 0
    size = 1
    restarted = False  # the launcher has started the processes again after one of them died

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (what JSON can say), in the order of the ranks."""
        return [value]

    def share(self, data: bytes | None) -> bytes | None:
        """Rank 0's `data`."""
        return data

    def gather_tensors(self, x: Tensor) -> Tensor:
        """Every rank's `x` [n], which has the same type, size and kind of device everywhere: [size, n]."""
        return x[None]

    def any(self, value: bool) -> bool:
        """Whether `value` is true on some rank."""
        return any(self.gather(value))

    def only_first(self, work: Callable[[], T]) -> T | None:
        """What `work` returns on rank 0; None on the others, which do not call it. Its errors end all ranks."""
        return work()

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """Errors that leave the block are reported by one rank only."""
        yield

    def leave(self) -> None:
        """Tell the others that this rank ends because its work is done."""


ALONE = Ranks()
"""The only process of a task."""


class Group(Ranks):
    """Ranks that torch.distributed connects. Made by `embedgrad.distributed.join.join`."""

    def __init__(self, place: Place, store: Any, lifeline: Lifeline) -> None:
        self.rank, self.size = place.rank, place.size
        self._store, self._lifeline = store, lifeline

    def gather(self, value: Any) -> list[Any]:
        """See `Ranks`."""
        data = json.dumps(value).encode()
        sizes = self.gather_tensors(torch.tensor([len(data)])).flatten().tolist()
        padded = torch.frombuffer(bytearray(data.ljust(max(sizes))), dtype=torch.uint8)
        rows = self.gather_tensors(padded).numpy()
        return [json.loads(row.tobytes()[:size]) for row, size in zip(rows, sizes, strict=True)]

    def share(self, data: bytes | None) -> bytes | None:
        """See `Ranks`."""
        with self._exchange():
            size = torch.tensor([-1 if data is None else len(data)])
            torch.distributed.broadcast(size, 0)
            if int(size) < 0:
                return None
            own = bytearray(data if self.leads and data is not None else int(size))
            if not own:
                return b""
            content = torch.frombuffer(own, dtype=torch.uint8)
            torch.distributed.broadcast(content, 0)
            return bytes(own)

    def gather_tensors(self, x: Tensor) -> Tensor:
        """See `Ranks`. A GPU's tensor is gathered on the GPU, and the host does not wait."""
        rows = torch.empty(self.size * x.numel(), dtype=x.dtype, device=x.device)
        with self._exchange():
            _all_gather(rows, x.contiguous())
        return rows.view(self.size, x.numel())

    def only_first(self, work: Callable[[], T]) -> T | None:
        """See `Ranks`."""
        if not self.leads:
            told = self.share(None)
            if told:
                raise ToldElsewhere(told.decode())
            return None
        try:
            result = work()
        except EmbedGradError as error:
            self.share((str(error) or type(error).__name__).encode())
            raise
        self.share(b"")
        return result

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """See `Ranks`. The rank that reports an error first is the only one that reports it."""
        try:
            yield
        except ToldElsewhere:
            raise
        except RankLost as lost:
            if self._someone_spoke():
                raise ToldElsewhere(lost) from lost
            if not self._first_to_say("lost"):
                raise ToldElsewhere(lost) from lost
            raise
        except EmbedGradError as error:
            first = self._first_to_say(str(error))
            if self.leads:
                self._wait_for_others()
            if not first:
                raise ToldElsewhere(error) from error
            raise

    def leave(self) -> None:
        """See `Ranks`."""
        self._lifeline.leave()
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()

    def _first_to_say(self, sentence: str) -> bool:
        try:
            self._store.set("spoke", "1")
            first = int(self._store.add(f"error/{sentence}", 1)) == 1
            self._store.add("errors", 1)
            return first
        except (RuntimeError, ValueError):  # the store went with its process
            return True

    def _wait_for_others(self) -> None:
        """Rank 0 holds the store. It waits before it ends, so that ranks with the same error can look there whether one
        of them has reported it."""
        until = time.monotonic() + _ERRORS
        with contextlib.suppress(RuntimeError, ValueError):
            while time.monotonic() < until and int(self._store.add("errors", 0)) < self.size:
                time.sleep(0.02)

    def _someone_spoke(self) -> bool:
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            try:
                if self._store.check(["spoke"]):
                    return True
            except (RuntimeError, ValueError):
                return False
            time.sleep(0.1)
        return False

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Inside, a connection that breaks raises RankLost."""
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
            raise RankLost(
                "another process of this run has ended or cannot be reached; what was saved is whole, and --resume "
                "goes on from the last checkpoint."
            ) from error


def parts_of(count: int, ranks: Ranks) -> list[range]:
    """`count` items in one run of neighbours for each rank, whose sizes differ by one at most."""
    cuts = [count * rank // ranks.size for rank in range(ranks.size + 1)]
    return [range(first, last) for first, last in pairwise(cuts)]
