"""The generation loop for every backend and type: decode with the model's operations, then choose and advance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from embedgrad.entropy import token_entropy
from embedgrad.model.decoding import KeyValueCache
from embedgrad.model.model import Model
from embedgrad.slots import RUNNING, Slots


class PlainLoop:
    """Writes the answers of `slots`; rows of the cache are the slots `rows`."""

    def __init__(self, model: Model, slots: Slots) -> None:
        self._model, self._slots = model, slots
        self._cache: KeyValueCache | None = None
        self._rows: list[int] = []
        self._logits: Tensor | None = None  # of all rows, where their tokens are still to be chosen

    def enter(self, cache: KeyValueCache, logits: Tensor, slots: Sequence[int]) -> None:
        """Take over sequences whose contexts are in `cache` and whose next logits are `logits` [n, V]."""
        if self._cache is None or not self._rows:
            self._cache, self._logits = cache, logits
        else:
            self._logits = torch.cat([self._decode(), logits])
            self._cache.join(cache)
        self._rows += slots

    def run(self, on_step: Callable[[], bool], refill: int) -> None:
        """Until all answers are written, `refill` (0: never) slots have been left, or `on_step` says True."""
        slots = self._slots
        while self._rows:
            logits = self._decode() if self._logits is None else self._logits
            self._logits = None
            self._choose(logits)
            for slot in self._rows:
                slots.advance(slot)
            stopped = on_step()
            self._leave()
            if stopped or (refill and slots.size - len(self._rows) >= refill):
                return

    def _decode(self) -> Tensor:
        assert self._cache is not None
        ids = torch.tensor(self._slots.inputs[self._rows], dtype=torch.int64, device=self._model.device)
        return self._cache.next_logits(ids)

    def _choose(self, logits: Tensor) -> None:
        slots, rows = self._slots, self._rows
        sampling = slots.sampling
        plain = not (sampling.temperature or slots.counts is not None or slots.bias is not None or slots.choice)
        if plain and logits.device.type != "cpu" and bool(logits.amax(dim=1).isfinite().all()):
            slots.tokens[rows], slots.status[rows] = logits.argmax(dim=1).cpu().numpy(), 0
        else:
            slots.choose(logits.float().cpu().numpy(), rows)
        places = np.asarray(rows), slots.lengths[rows]
        usable = slots.status[rows] == 0
        if not usable.all():
            return  # an error is on its way
        tokens = torch.tensor(slots.tokens[rows], dtype=torch.int64, device=logits.device)
        log_p = logits.float().log_softmax(dim=1).gather(1, tokens[:, None]).squeeze(1)
        slots.log_probability[places] = log_p.cpu().numpy()
        slots.entropy[places] = token_entropy(logits).float().cpu().numpy()

    def _leave(self) -> None:
        going = [n for n, slot in enumerate(self._rows) if self._slots.reasons[slot] == RUNNING]
        if len(going) == len(self._rows):
            return
        self._rows = [self._rows[n] for n in going]
        if going and self._cache is not None:
            self._cache.keep(torch.tensor(going, device=self._model.device))
