"""The generation loop for every backend and type. It decodes with the model's operations, chooses and advances."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from embedgrad.engine.model import Model
from embedgrad.generation.entropy import token_entropy
from embedgrad.generation.kv_cache import KeyValueCache
from embedgrad.generation.slots import RUNNING, Slots


class PlainLoop:
    """Writes the answers of `slots`."""

    def __init__(self, model: Model, slots: Slots) -> None:
        self._model, self._slots = model, slots
        self._cache: KeyValueCache | None = None
        self._running: list[int] = []  # the slot of each sequence in the cache
        self._logits: Tensor | None = None  # [sequences, V] from which tokens must still be chosen
        self._chosen = torch.empty(0)  # [sequences, V] from which the last tokens were chosen

    def enter(self, cache: KeyValueCache, logits: Tensor, slots: Sequence[int]) -> None:
        """Takes over n sequences for `slots`, with their KV cache and the logits [n, V] for their next tokens."""
        if self._cache is None or not self._running:
            self._cache, self._logits = cache, logits
        else:
            self._logits = torch.cat([self._decode(), logits])
            self._cache.join(cache)
        self._running += slots

    def run(self, on_step: Callable[[], bool], refill: int) -> None:
        """Writes tokens until all answers have ended, `refill` slots are free (0: ignored), or `on_step` returns True.

        `on_step` is called after each step, which writes one token in every running slot.
        """
        slots = self._slots
        while self._running:
            logits = self._decode() if self._logits is None else self._logits
            self._logits = None
            self._choose(logits)
            for slot in self._running:
                slots.advance(slot)
            stopped = on_step()
            self._leave()
            if stopped or (refill and slots.size - len(self._running) >= refill):
                return

    def logits(self, slot: int) -> Tensor:
        """The logits [V] from which the slot's last token was chosen; inside `on_step` only."""
        return self._chosen[self._running.index(slot)]

    def _decode(self) -> Tensor:
        assert self._cache is not None
        ids = torch.tensor(self._slots.inputs[self._running], dtype=torch.int64, device=self._model.device)
        return self._cache.next_logits(ids)

    def _choose(self, logits: Tensor) -> None:
        slots, running = self._slots, self._running
        self._chosen = logits
        greedy = not slots.params["temperature"][running].any()
        plain = greedy and slots.counts is None and slots.bias is None and slots.choice is None
        if plain and logits.device.type != "cpu" and bool(logits.amax(dim=1).isfinite().all()):
            slots.tokens[running], slots.status[running] = logits.argmax(dim=1).cpu().numpy(), 0
        else:
            slots.choose(logits.float().cpu().numpy(), running)
        places = np.asarray(running), slots.lengths[running]
        usable = slots.status[running] == 0
        if not usable.all():
            return  # Slots.check will raise
        tokens = torch.tensor(slots.tokens[running], dtype=torch.int64, device=logits.device)
        log_p = logits.float().log_softmax(dim=1).gather(1, tokens[:, None]).squeeze(1)
        slots.log_probability[places] = log_p.cpu().numpy()
        slots.entropy[places] = token_entropy(logits).float().cpu().numpy()

    def _leave(self) -> None:
        """Removes the sequences that have ended from the cache."""
        going = [n for n, slot in enumerate(self._running) if self._slots.reasons[slot] == RUNNING]
        if len(going) == len(self._running):
            return
        self._running = [self._running[n] for n in going]
        if going and self._cache is not None:
            self._cache.keep(torch.tensor(going, device=self._model.device))
