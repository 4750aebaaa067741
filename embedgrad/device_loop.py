"""The generation loop on a GPU: decode, choose and advance without a look at the host in between.

The state of `Slots` lies on the device as well, and csrc/cuda chooses tokens and advances sequences there. Decoding a
token for all slots, choosing the next ones and advancing is one CUDA graph, where the decode step can be captured. The
host only launches; every few tokens it fetches what has been written. A slot whose answer has ended stands still: it
decodes its last token again, to the same place, until a new query enters.
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
from embedgrad.model.decoding import GROWTH, KeyValueCache
from embedgrad.model.model import Model
from embedgrad.slots import RUNNING, Slots

LOOK = 8  # tokens between two looks at the device; a look costs a wait, and answers that have ended keep their slots

_READ = ("ids", "lengths", "positions", "steps", "reasons", "running", "status", "entropy", "log_probability")
_ENTERING = ("lengths", "positions", "steps", "streams", "reasons", "nodes", "counts")  # rows that the host writes
_SIGNED = {np.dtype(np.uint32): np.int32, np.dtype(np.uint64): np.int64}  # torch knows these, and no bit differs


class DeviceLoop:
    """Writes the answers of `slots`; row i of the cache and of every tensor is slot i.

    `core` is the CUDA library, `each_token` says whether `on_step` must see every single token. Any device whose
    addresses `core` takes will do: with csrc/cuda built for the host's emulation, the CPU.
    """

    def __init__(self, model: Model, slots: Slots, core: ctypes.CDLL, *, each_token: bool = False) -> None:
        self._model, self._slots, self._core = model, slots, core
        self._look = 1 if each_token else LOOK
        device, tree = model.device, slots.choice
        names = {*_READ, *_ENTERING, "inputs", "tokens"}
        arrays = {name: getattr(slots, name) for name in names} | {"bias": slots.bias, "stop": slots.stop_tokens}
        if tree is not None:
            arrays |= {name: getattr(tree, name) for name in ("children", "child_tokens", "child_nodes")}
        self._state = {name: _tensor(x).to(device, copy=True) for name, x in arrays.items() if x is not None}
        self._logits = torch.zeros(slots.size, slots.vocabulary, device=device)
        self._token_entropy, self._token_log_p = torch.zeros(2, slots.size, device=device)
        self._params, self._sampling, self._advance = slots.params(), self._sampling_batch(), self._advance_batch()
        self._cache: KeyValueCache | None = None
        self._longest = 0  # places behind the trunk that are taken, at most, in any running sequence
        self._chosen = True  # the tokens that `_logits` are for have been chosen
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False  # a step with these addresses has run: everything is compiled and loaded
        self._capturable = device.type == "cuda" and isinstance(model.weights.layers, list)  # not: streamed blocks

    def enter(self, cache: KeyValueCache, logits: Tensor, slots: Sequence[int]) -> None:
        """Take over sequences whose contexts are in `cache` and whose next logits are `logits` [n, V]."""
        longest = int(cache.lengths.max())
        if self._cache is None:
            assert len(slots) == self._slots.size, "the first queries fill all slots"
            self._cache = cache
        else:
            if self._slots.running[0] > len(slots):  # others go on; they decode into their own rows only
                self._decode()
            if longest >= self._cache.own.shape[3]:
                self._grow(longest + GROWTH)
            self._cache.own[:, :, list(slots), :longest] = cache.own[:, :, :, :longest]
        for name in _ENTERING:
            array = getattr(self._slots, name)
            if array is not None:
                self._state[name][list(slots)] = _tensor(array[list(slots)]).to(self._model.device)
        self._write("running")
        self._logits[list(slots)] = logits.float()
        self._longest, self._chosen = max(self._longest, longest), False

    def run(self, on_step: Callable[[], bool], refill: int) -> None:
        """Until all answers are written, `refill` (0: never) slots are free, or `on_step`, called after each token of
        all, says True. It sees the slots as they were at the last look. Nothing runs on when the call has ended."""
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
            if not np.array_equal(seen, slots.reasons):  # answers that are finished, or that the caller has ended
                self._write("reasons")
                self._write("running")
            if refill and slots.size - int(slots.running[0]) >= refill:
                return

    def _steps_to_look(self) -> int:
        """No more than the longest answer can still take."""
        slots = self._slots
        return min(self._look, slots.capacity - int(slots.lengths[slots.active()].min()))

    def _step(self) -> None:
        """One token for every slot that is running."""
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
        """The next logits, outside of a graph; their tokens are still to be chosen."""
        self._make_room()
        self._next_logits()
        self._longest += 1

    def _make_room(self) -> None:
        assert self._cache is not None
        if self._longest >= self._cache.own.shape[3]:
            self._grow(self._cache.own.shape[3] + max(GROWTH, self._cache.own.shape[3] // 2))

    def _grow(self, capacity: int) -> None:
        """The cache moves, so that a graph would read what is no longer there."""
        assert self._cache is not None
        self._settle()
        self._graph, self._warm = None, False
        self._cache.grow(capacity - self._cache.own.shape[3])

    def _settle(self) -> None:
        """Wait for what has been launched: a graph is not to be thrown away while it runs."""
        if self._graph is not None:
            torch.cuda.synchronize(self._model.device)

    def _next_logits(self) -> None:
        cache, state = self._cache, self._state
        assert cache is not None
        last = cache.own.shape[3] - 1  # `_make_room` has seen to it that no running sequence needs another place
        own = (state["positions"].long() - cache.trunk.shape[2]).clamp(0, last)
        cache.rewind((own, last))
        self._logits.copy_(cache.logits(cache.advance(state["inputs"].long())))

    def _choose(self) -> None:
        """Choose a token for each running slot by `_logits`, note how sure the model was, and append or stop."""
        state, (rows, vocabulary) = self._state, self._logits.shape
        numbers = (self._token_entropy, self._token_log_p)
        asked = (state["tokens"], *numbers)
        self._call("sample", ctypes.byref(self._params), ctypes.byref(self._sampling))
        self._call(
            "token_entropy", self._logits.data_ptr(), vocabulary, rows, vocabulary, *(x.data_ptr() for x in asked)
        )
        going = (state["reasons"] == RUNNING)[:, None]
        place = state["lengths"].long().clamp_max(self._slots.capacity - 1)[:, None]
        for name, new in zip(("entropy", "log_probability"), numbers, strict=True):
            kept = state[name]
            kept.scatter_(1, place, torch.where(going, new[:, None], kept.gather(1, place)))
        self._call("advance", ctypes.byref(self._advance))
        self._chosen = True

    def _call(self, function: str, *arguments: Any) -> None:
        """Launch one of the library's functions on the stream that torch launches on."""
        with torch.cuda.device_of(self._logits):
            stream = torch.cuda.current_stream().cuda_stream if self._logits.is_cuda else None
            check(getattr(self._core, f"embedgrad_{function}_cuda")(*arguments, stream), function)

    def _read(self) -> None:
        """Fetch what has been written; waits for the device."""
        for name in _READ:
            _tensor(getattr(self._slots, name)).copy_(self._state[name])
        slots, trunk = self._slots, 0 if self._cache is None else self._cache.trunk.shape[2]
        running = slots.positions[slots.reasons == RUNNING]
        self._longest = int(running.max()) - trunk if len(running) else 0

    def _write(self, name: str) -> None:
        self._state[name].copy_(_tensor(getattr(self._slots, name)))

    def _address(self, name: str) -> int | None:
        tensor = self._state.get(name)
        return None if tensor is None else tensor.data_ptr()

    def _sampling_batch(self) -> native_core.SamplingBatch:
        slots = self._slots
        names = (
            "streams", "steps", "counts", "bias", "nodes", "children", "child_tokens", "reasons", "tokens", "status",
        )  # fmt: skip
        return native_core.SamplingBatch(
            self._logits.data_ptr(), slots.vocabulary, slots.size, slots.vocabulary, *map(self._address, names)
        )

    def _advance_batch(self) -> native_core.AdvanceBatch:
        slots = self._slots
        names = (
            "stop", "tokens", "status", "children", "child_tokens", "child_nodes", "ids", "lengths", "inputs",
            "positions", "steps", "counts", "nodes", "reasons", "running",
        )  # fmt: skip
        most = slots.capacity  # sampling.max_new_tokens, or what the context holds if that is less
        return native_core.AdvanceBatch(
            slots.size, slots.vocabulary, slots.capacity, most, slots.limits.max_position,
            len(slots.stop_tokens), *map(self._address, names),
        )  # fmt: skip


def _tensor(array: np.ndarray) -> Tensor:
    """The array's memory as a tensor; unsigned numbers as signed ones of the same bits."""
    return torch.from_numpy(array.view(_SIGNED.get(array.dtype, array.dtype)))
