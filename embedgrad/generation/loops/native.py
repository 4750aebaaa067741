"""The generation loop in csrc/decode/loop.h: it decodes, chooses and advances without Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from embedgrad.backends import native_core
from embedgrad.engine.native_decoder import NativeDecoder
from embedgrad.generation.constrained import ForcedChoice
from embedgrad.generation.kv_cache import GROWTH, KeyValueCache
from embedgrad.generation.slots import RUNNING, Slots, address


class NativeLoop:
    """Writes the answers of `slots`. A slot's keys and values stay in place until another query enters the slot.

    callbacks: `on_step` runs code of the user, which may use the same model. It is then called after the loop in csrc/
    has returned, whose team of threads and memory are free for that code. This costs some 40 µs for each step.
    """

    def __init__(self, decoder: NativeDecoder, slots: Slots, *, callbacks: bool = False) -> None:
        self._decoder, self._slots, self._callbacks = decoder, slots, callbacks
        self._prefix = self._own = torch.empty(0)
        self._logits = torch.empty(slots.size, slots.vocabulary)
        self._fresh = np.zeros(slots.size, np.int32)

    def enter(self, cache: KeyValueCache, logits: Tensor, slots: Sequence[int]) -> None:
        """Takes over n sequences for `slots`, with their KV cache and the logits [n, V] for their next tokens."""
        self._prefix = cache.prefix.contiguous()
        self._fresh[slots] = 1
        self._logits[slots] = logits
        if list(slots) == list(range(self._slots.size)):
            self._own = cache.own
            return
        if not self._own.numel():
            shape = list(cache.own.shape)
            shape[2] = self._slots.size
            self._own = torch.empty(shape)
        longest = int(cache.lengths.max())
        if longest >= self._own.shape[3]:
            self._grow(longest + GROWTH)
        self._own[:, :, list(slots), :longest] = cache.own[:, :, :, :longest]

    def logits(self, slot: int) -> Tensor:
        """The logits [V] from which the slot's last token was chosen; inside `on_step` only."""
        return self._logits[slot]

    def run(self, on_step: Callable[[], bool], refill: int) -> None:
        """Writes tokens until all answers have ended, `refill` slots are free (0: ignored), or `on_step` returns True.

        `on_step` is called after each step, which writes one token in every running slot. Its exceptions are raised
        here.
        """
        raised: list[BaseException] = []

        def step(_: object) -> int:
            try:
                return int(self._callbacks or on_step())
            except BaseException as error:  # ctypes would print the exception and continue
                raised.append(error)
                return 1

        callback = native_core.STEP(step)
        while True:
            if self._is_full():  # the call before may have ended for another reason at the step that filled the cache
                self._grow(self._own.shape[3] + max(GROWTH, self._own.shape[3] // 2))
            end = self._decoder.run(self._state(callback, refill))
            if raised:
                raise raised[0]
            if end == "stopped" and self._callbacks:
                end = "stopped" if on_step() else self._end(refill)
            if end not in ("cache full", "go on"):
                return

    def _is_full(self) -> bool:
        """Whether a running sequence has no room for its next token."""
        slots = self._slots
        running = slots.reasons == RUNNING
        return bool(running.any()) and slots.positions[running].max() >= self._prefix.shape[2] + self._own.shape[3]

    def _end(self, refill: int) -> str:
        """What csrc/ would say after a step at which `on_step` does not stop the loop."""
        slots = self._slots
        running = slots.reasons == RUNNING
        if not running.any():
            return "all done"
        if refill and slots.size - int(running.sum()) >= refill:
            return "slots free"
        return "go on"

    def _state(self, callback: object, refill: int) -> native_core.Loop:
        slots = self._slots
        tree = slots.choice
        names = ("params", "streams", "steps", "counts", "bias_rows", "nodes", "reasons", "tokens", "status")
        arrays = {name: getattr(slots, name) for name in names}
        advance = native_core.AdvanceBatch(
            slots.size, slots.vocabulary, slots.capacity, slots.limits.max_position, len(slots.stop_tokens),
            *(address(x) for x in (slots.stop_tokens, slots.most, slots.tokens, slots.status)),
            *((None, None, None) if tree is None else _addresses(tree)),
            *(address(x) for x in (slots.ids, slots.lengths, slots.inputs, slots.positions, slots.steps)),
            address(slots.counts), address(slots.nodes), address(slots.reasons), address(slots.running),
        )  # fmt: skip
        return native_core.Loop(
            self._decoder.cache(self._prefix, self._own), slots.batch(self._logits.numpy(), arrays), advance,
            address(self._fresh), address(slots.entropy), address(slots.log_probability), refill, callback, None,
        )  # fmt: skip

    def _grow(self, capacity: int) -> None:
        shape = list(self._own.shape)
        shape[3] = capacity
        grown = torch.empty(shape)
        grown[:, :, :, : self._own.shape[3]] = self._own
        self._own = grown


def _addresses(tree: ForcedChoice) -> tuple[int | None, ...]:
    return address(tree.children), address(tree.child_tokens), address(tree.child_nodes)
