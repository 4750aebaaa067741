"""The generation loop on a GPU: decode, choose and advance without waiting for the host.

A copy of the state of `Slots` is on the device, where csrc/cuda chooses tokens and advances sequences. One step decodes
a token for all slots, chooses the next tokens and advances; it is one CUDA graph if the decode step can be captured.
The host only launches steps, and reads the state back every few tokens. A slot whose answer has ended does not advance:
until a new query enters, it decodes its last token again at the same position.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedgrad.backends import native_core
from embedgrad.backends.cuda_core import check
from embedgrad.engine.model import Model
from embedgrad.generation.kv_cache import GROWTH, KeyValueCache
from embedgrad.generation.slots import RUNNING, Slots

# Steps between two reads of the device's state. A read waits for the device. Until the next read an answer that has
# ended keeps its slot.
LOOK = 8

_READ = ("ids", "lengths", "positions", "steps", "reasons", "running", "status", "entropy", "log_probability")
# Set when a query enters.
_ENTERING = ("params", "most", "lengths", "positions", "steps", "streams", "reasons", "nodes", "counts", "bias_rows")
_SIGNED = {np.dtype(np.uint32): np.int32, np.dtype(np.uint64): np.int64}  # torch's types with the same bits


class DeviceLoop:
    """Writes the answers of `slots`. Sequence i of the KV cache and entry i of every tensor belong to slot i.

    core: the CUDA library. each_token: `on_step` must see every token. The device may be any whose addresses `core`
    takes; with csrc/cuda built for the emulation on the host it is the CPU.
    """

    def __init__(self, model: Model, slots: Slots, core: ctypes.CDLL, *, each_token: bool = False) -> None:
        self._model, self._slots, self._core = model, slots, core
        self._look = 1 if each_token else LOOK
        device = model.device
        self._logits = torch.zeros(slots.size, slots.vocabulary, device=device)
        self._token_entropy, self._token_log_p = torch.zeros(2, slots.size, device=device)
        self._place_state()
        self._cache: KeyValueCache | None = None
        self._longest = 0  # upper bound for the tokens of a running sequence after the prefix
        self._chosen = True  # whether tokens have been chosen from `_logits`
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False  # whether a step with the present addresses has run, so that all kernels are compiled
        self._capturable = device.type == "cuda" and isinstance(model.weights.layers, list)  # layers are not streamed

    def _place_state(self) -> None:
        """Copies all arrays of `Slots` to the device. Their addresses change, so the captured graph is dropped."""
        slots, tree = self._slots, self._slots.choice
        names = {*_READ, *_ENTERING, "inputs", "tokens"}
        arrays = {name: getattr(slots, name) for name in names} | {"bias": slots.bias, "stop": slots.stop_tokens}
        if tree is not None:
            arrays |= {name: getattr(tree, name) for name in ("children", "child_tokens", "child_nodes")}
        device = self._model.device
        self._state = {name: _tensor(x).to(device, copy=True) for name, x in arrays.items() if x is not None}
        self._sampling, self._advance = self._sampling_batch(), self._advance_batch()
        self._version = slots.version

    def logits(self, slot: int) -> Tensor:
        """The logits [V] from which the slot's last token was chosen; inside `on_step` only, with each_token."""
        return self._logits[slot].cpu()

    def enter(self, cache: KeyValueCache, logits: Tensor, slots: Sequence[int]) -> None:
        """Takes over n sequences for `slots`, with their KV cache and the logits [n, V] for their next tokens."""
        longest = int(cache.lengths.max())
        if self._cache is None and len(slots) == self._slots.size:
            self._cache = cache
        else:
            if self._cache is None:
                lengths = torch.ones(self._slots.size, dtype=torch.int64)
                self._cache = KeyValueCache(self._model, cache.prefix, lengths)
                self._cache.own.zero_()  # an empty slot is decoded, too
            if self._slots.running[0] > len(slots):  # other slots are running; they are decoded first
                self._decode()
            if longest >= self._cache.own.shape[3]:
                self._grow(self._cache, longest + GROWTH)
            self._cache.own[:, :, list(slots), :longest] = cache.own[:, :, :, :longest]
        if self._version != self._slots.version:
            self._settle()
            self._graph, self._warm = None, False
            self._place_state()
        for name in _ENTERING:
            array = getattr(self._slots, name)
            if array is not None:
                self._state[name][list(slots)] = _tensor(array[list(slots)]).to(self._model.device)
        if self._slots.bias is not None:
            self._state["bias"].copy_(_tensor(self._slots.bias))
        self._write("running")
        self._logits[list(slots)] = logits.float()
        self._longest, self._chosen = max(self._longest, longest), False

    def run(self, on_step: Callable[[], bool], refill: int) -> None:
        """Writes tokens until all answers have ended, `refill` slots are free (0: ignored), or `on_step` returns True.

        `on_step` is called after each step and sees the state of the last read. When the call returns, the captured
        graph is no longer running.
        """
        try:
            self._run(on_step, refill)
        finally:
            self._settle()

    def _run(self, on_step: Callable[[], bool], refill: int) -> None:
        slots = self._slots
        while slots.running[0] > 0:
            for _ in range(self._steps_to_look() - 1):
                self._step()
                if on_step():
                    return
            self._step()
            self._read()
            seen = slots.reasons.copy()
            if on_step():
                return
            if not np.array_equal(seen, slots.reasons):  # the caller has taken or ended answers
                self._write("reasons")
                self._write("running")
            if refill and slots.size - int(slots.running[0]) >= refill:
                return

    def _steps_to_look(self) -> int:
        """Steps until the next read, at most as many as the longest answer can still use."""
        slots = self._slots
        return min(self._look, slots.capacity - int(slots.lengths[slots.active()].min()))

    def _step(self) -> None:
        """Writes one token in every running slot."""
        if not self._chosen:
            self._choose()
            return
        self._make_room()
        if self._graph is None and self._capturable and self._warm:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device_of(self._logits), torch.cuda.graph(graph):
                self._decode_and_choose()
            self._graph = graph
        if self._graph is not None:
            self._graph.replay()
        else:
            self._decode_and_choose()
            self._warm = True
        self._longest += 1

    def _decode_and_choose(self) -> None:
        self._next_logits()
        self._choose()

    def _decode(self) -> None:
        """Computes the next logits outside of the graph, without choosing tokens."""
        self._make_room()
        self._next_logits()
        self._longest += 1

    def _make_room(self) -> None:
        assert self._cache is not None
        if self._longest >= self._cache.own.shape[3]:
            self._grow(self._cache, self._cache.own.shape[3] + max(GROWTH, self._cache.own.shape[3] // 2))

    def _grow(self, cache: KeyValueCache, capacity: int) -> None:
        """Enlarges the KV cache. It is reallocated, so the captured graph is dropped."""
        self._settle()
        self._graph, self._warm = None, False
        cache.grow(capacity - cache.own.shape[3])

    def _settle(self) -> None:
        """Waits for the device, because a graph must not be deleted while it runs."""
        if self._graph is not None:
            torch.cuda.synchronize(self._model.device)

    def _next_logits(self) -> None:
        cache, state = self._cache, self._state
        assert cache is not None
        last = cache.own.shape[3] - 1  # after `_make_room` no running sequence needs a later position
        own = (state["positions"].long() - cache.prefix.shape[2]).clamp(0, last)
        cache.rewind((own, last))
        cache.logits(cache.advance(state["inputs"].long()), out=self._logits)

    def _choose(self) -> None:
        """Chooses each running slot's token from `_logits`, stores its entropy and log-probability, and advances."""
        state, (size, vocabulary) = self._state, self._logits.shape
        numbers = (self._token_entropy, self._token_log_p)
        asked = (state["tokens"], *numbers)
        self._call("sample", ctypes.byref(self._sampling))
        self._call(
            "token_entropy", self._logits.data_ptr(), vocabulary, size, vocabulary, *(x.data_ptr() for x in asked)
        )
        going = (state["reasons"] == RUNNING)[:, None]
        place = state["lengths"].long().clamp_max(self._slots.capacity - 1)[:, None]
        for name, new in zip(("entropy", "log_probability"), numbers, strict=True):
            kept = state[name]
            kept.scatter_(1, place, torch.where(going, new[:, None], kept.gather(1, place)))
        self._call("advance", ctypes.byref(self._advance))
        self._chosen = True

    def _call(self, function: str, *arguments: Any) -> None:
        """Launches a function of the library on torch's current stream."""
        with torch.cuda.device_of(self._logits):
            stream = torch.cuda.current_stream().cuda_stream if self._logits.is_cuda else None
            check(getattr(self._core, f"embedgrad_{function}_cuda")(*arguments, stream), function)

    def _read(self) -> None:
        """Copies the state from the device to `Slots`. Waits for the device."""
        for name in _READ:
            _tensor(getattr(self._slots, name)).copy_(self._state[name])
        slots, prefix = self._slots, 0 if self._cache is None else self._cache.prefix.shape[2]
        running = slots.positions[slots.reasons == RUNNING]
        self._longest = int(running.max()) - prefix if len(running) else 0

    def _write(self, name: str) -> None:
        self._state[name].copy_(_tensor(getattr(self._slots, name)))

    def _address(self, name: str) -> int | None:
        tensor = self._state.get(name)
        return None if tensor is None else tensor.data_ptr()

    def _sampling_batch(self) -> native_core.SamplingBatch:
        slots = self._slots
        names = (
            "streams", "steps", "counts", "bias", "bias_rows", "nodes", "children", "child_tokens", "reasons", "tokens",
            "status",
        )  # fmt: skip
        return native_core.SamplingBatch(
            self._address("params"), self._logits.data_ptr(), slots.vocabulary, slots.size, slots.vocabulary,
            *map(self._address, names),
        )  # fmt: skip

    def _advance_batch(self) -> native_core.AdvanceBatch:
        slots = self._slots
        names = (
            "stop", "most", "tokens", "status", "children", "child_tokens", "child_nodes", "ids", "lengths", "inputs",
            "positions", "steps", "counts", "nodes", "reasons", "running",
        )  # fmt: skip
        return native_core.AdvanceBatch(
            slots.size, slots.vocabulary, slots.capacity, slots.limits.max_position, len(slots.stop_tokens),
            *map(self._address, names),
        )  # fmt: skip


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory.

    Unsigned integers become signed ones with the same bits, and an array of structs [n] becomes bytes [n, size].
    """
    if array.dtype.fields is not None:
        return torch.from_numpy(array.view(np.uint8).reshape(len(array), array.dtype.itemsize))
    return torch.from_numpy(array.view(_SIGNED.get(array.dtype, array.dtype)))
