"""What the processes of one run agree on: when to stop, that they began alike, and that they hold the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from embedgrad.distributed.ranks import Ranks
from embedgrad.train.checkpoints import RunState, differences, tensor_hash
from embedgrad.util.errors import ConfigError, TrainingError
from embedgrad.util.interrupts import StopRequest


class SharedStop:
    """A request to stop that counts on all ranks from the same moment on. reason: one of REASONS, or None."""

    def __init__(self, local: StopRequest, ranks: Ranks) -> None:
        self._local, self._ranks = local, ranks
        self._agreed: str | None = None

    @property
    def asked(self) -> bool:
        """Whether this process has received a signal; the others may not know it yet."""
        return self._local.requested

    @property
    def reason(self) -> str | None:
        """Why the run stops, as all ranks know it."""
        return self._local.reason if self._ranks.size == 1 else self._agreed

    @property
    def requested(self) -> bool:
        """Whether the run stops, as all ranks know it."""
        return self.reason is not None

    def agree(self) -> bool:
        """Ask all ranks whether one of them has received a signal. Where one has, all stop."""
        if self._ranks.size > 1 and self._agreed is None:
            self._agreed = next((reason for reason in self._ranks.gather(self._local.reason) if reason), None)
        return self.requested


def check_same_start(ranks: Ranks, identity: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises ConfigError where a rank begins with other settings, data, model or threads than rank 0."""
    told = ranks.gather({**identity, "config": dict(config)})
    for rank, other in enumerate(told):
        changed = differences(told[0], other)
        if changed:
            raise ConfigError(
                f"rank {rank} differs from rank 0 in: {', '.join(changed)}; give every process the same settings, "
                "model, data and OMP_NUM_THREADS."
            )


def check_devices(ranks: Ranks, device: torch.device) -> None:
    """Raises ConfigError where the model of a rank is on another GPU than that of its local rank, which several would
    share."""
    if ranks.size == 1:
        return
    elsewhere = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    if ranks.any(elsewhere):
        raise ConfigError(
            f"model.device names one GPU ({device}) for {ranks.size} processes, each of which takes its own; give "
            "device: cuda without a number."
        )


def check_alike(ranks: Ranks, state: RunState) -> None:
    """Raises TrainingError where the ranks no longer hold the same bits."""
    if ranks.size == 1:
        return
    told = ranks.gather(tensor_hash(state.e, state.m, state.v, state.best))
    for rank, other in enumerate(told):
        if other != told[0]:
            raise TrainingError(
                f"rank {rank} holds another prompt than rank 0 after step {state.step}: its processor or GPU rounds "
                "otherwise; use machines of one kind."
            )
