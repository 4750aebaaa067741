"""One function of a packed pass, launched many times: on a GPU as a CUDA graph for each size class.

A graph replays the same launches on the same addresses. So what changes from pass to pass lies in buffers that stay in
place: the pass's index tensors and work lists, which travel to the device in one copy; the prefix's keys and values;
and whatever the function reads besides, which its owner keeps in place. The arena is begun anew at every pass and hands
out the same addresses. Passes are padded up to a few size classes (`size_classes`).

A class is run without a graph when it is first met, which compiles its kernels, and captured when it is met again.
Where no graph can be had, the padded passes go on without one, with the same bits. On a CPU nothing is padded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from embedgrad.engine.model import Model
from embedgrad.engine.packed_pass import PackedPass, PassSize, build_pass, host_pass
from embedgrad.engine.prefix_cache import Path
from embedgrad.engine.size_classes import fitting, size_classes
from embedgrad.engine.tree import TokenTree
from embedgrad.model.streaming import StreamedLayers
from embedgrad.util.host import Parcel
from embedgrad.util.shown import first_line

STAGES = 2  # passes whose inputs wait for the device in pinned memory at once: one is launched before one is read

Body = Callable[[PackedPass, str | None], Tensor]
"""What is launched with a pass and a memory policy: the numbers [n] float64 that it leaves on the device. It must not
wait for the device."""


class GraphWarning(UserWarning):
    """No CUDA graph can be had: every launch goes through Python, more slowly."""


class Capture(Protocol):
    """How launches are captured; replaced in tests."""

    def __call__(self, launch: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Capture `launch()` without running it: what replays it, and the tensor that it returned."""


class CudaCapture:
    """CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, launch: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """See `Capture`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            numbers = launch()
        return graph.replay, numbers


@dataclass(frozen=True)
class Prepared:
    """A pass that is ready to be launched: its tree, and on a GPU its padded host tensors and their class."""

    tree: TokenTree
    on_host: PackedPass | None = None
    size: PassSize | None = None


class Launched:
    """Numbers on their way from the device."""

    def __init__(self, tree: TokenTree, numbers: Tensor) -> None:
        self.tree = tree
        self._numbers, self._arrived = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Tensor:
        """The numbers on the CPU; waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers


@dataclass
class _Class:
    """One size class: where its inputs lie, and, once it is captured, how to replay it."""

    parcel: Parcel
    staged: list[Tensor]  # in pinned memory
    buffer: Tensor
    launches: int = 0
    replay: Callable[[], object] | None = None
    numbers: Tensor = field(default_factory=lambda: torch.empty(0))


class PassRunner:
    """Launches `body` on passes of a model."""

    def __init__(
        self,
        model: Model,
        body: Body,
        trees: Sequence[TokenTree],
        *,
        policy: str | None,
        memory_budget: int | None = None,
        capture: Capture | None = None,
        static: bool | None = None,
    ) -> None:
        """trees: those that will be run, as far as they are known. policy: what the body keeps for a backward pass, as
        `loss_and_grad` takes it; None where there is none. capture: default: CUDA graphs on a GPU, nothing on a CPU.
        static: whether passes are padded and their inputs stay in place; default: where launches are captured.

        Raises ConfigError: an unknown policy, or one that needs more than the memory budget.
        """
        self._model, self._body, self._policy, self._budget = model, body, policy, memory_budget
        self._static = capture is not None or model.device.type == "cuda" if static is None else static
        on_gpu, streamed = model.device.type == "cuda", isinstance(model.weights.layers, StreamedLayers)
        self._capture = CudaCapture() if self._static and on_gpu and capture is None and not streamed else capture
        self._sizes = size_classes([self._size(tree) for tree in trees]) if self._static and trees else []
        self._classes: dict[PassSize, _Class] = {}
        self._plan: tuple[str | None, int] = (policy, 0)
        self._planned_for = 0  # classes
        self._arena = model.arena.buffer  # that the captured launches know
        self._prefix = self._room_for_prefix(max((size.prefix for size in self._sizes), default=0))
        self._holds: tuple[Path, ...] = ()  # units whose keys and values are there

    def prepare(self, tree: TokenTree) -> Prepared:
        """All of a pass that can be done on the host, while the device works on others."""
        if not self._static:
            return Prepared(tree)
        size = self._size(tree)
        into = fitting(size, self._sizes)
        if into is None:
            (into,) = size_classes([size])
            self._sizes = sorted([*self._sizes, into], key=lambda each: each.tokens)
        shown = len(tree.prompt_positions) if into.shown is None else into.shown
        padded = tree.padded(into.tokens, into.prefix, into.rows or 0, shown, into.targets)
        return Prepared(tree, self._on_host(padded), into)

    def launch(self, prepared: Prepared) -> Launched:
        """Start the pass; nothing here waits for it. Raises ConfigError where the memory budget is too small."""
        with self._model.lock:
            return self._launch(prepared)

    def _launch(self, prepared: Prepared) -> Launched:
        size, on_host = prepared.size, prepared.on_host
        if size is None or on_host is None:
            return Launched(prepared.tree, self._plain(prepared.tree))
        self._fill_prefix(prepared.tree, size.prefix)
        policy = self._begin()
        one = self._class_for(size, on_host)
        staged = one.staged[one.launches % STAGES]
        one.buffer.copy_(one.parcel.fill(staged, on_host.tensors()), non_blocking=True)
        one.launches += 1
        if one.replay is None and one.launches > 1 and self._capture is not None:
            self._try_to_capture(one, on_host, policy)
        if one.replay is None:
            return Launched(prepared.tree, self._run(one, on_host, policy))
        one.replay()
        return Launched(prepared.tree, one.numbers)

    def _size(self, tree: TokenTree) -> PassSize:
        slots = tree.target_slot
        in_order = len(slots) == len(tree.predicting) and torch.equal(slots, torch.arange(len(slots)))
        shown = None if self._policy is None else len(tree.prompt_positions)
        return PassSize(tree.num_tokens, tree.num_prefix, len(tree.predicting), shown, len(slots), in_order)

    def _on_host(self, tree: TokenTree) -> PackedPass:
        model = self._model
        return host_pass(
            model.config, tree, model.ops, model.dtype, model.device, rows=tree.predicting,
            prompt_only=self._policy is not None, always_windowed=True,
        )  # fmt: skip

    def _plain(self, tree: TokenTree) -> Tensor:
        model, prefix = self._model, self._model.prefix_cache.units(tree.units)
        p = build_pass(
            model.config, tree, prefix, model.ops, model.dtype, model.device, rows=tree.predicting,
            prompt_only=self._policy is not None,
        )  # fmt: skip
        policy, nbytes = model.plan_memory([p.size], self._policy, self._budget)
        model.arena.begin(nbytes)
        return self._body(p, policy)

    def _run(self, one: _Class, on_host: PackedPass, policy: str | None) -> Tensor:
        """The body on the pass whose tensors lie in the class's places. Whatever it derives from them is its own: a
        work list that was not planned on the host is made anew, also when the pass is replayed."""
        self._begin()
        places = iter(one.parcel.views(one.buffer))
        tokens = on_host.masks[0].prefix
        prefix = (self._prefix[:, :, :tokens],) if tokens else ()
        p = on_host.moved(lambda _: next(places), prefix)
        return self._body(p.rotated(self._model.config, self._model.dtype), policy)

    def _begin(self) -> str | None:
        """The memory policy of all classes, for the largest of which the arena is made ready."""
        model = self._model
        if self._planned_for != len(self._sizes):
            self._plan = model.plan_memory(self._sizes, self._policy, self._budget)
            self._planned_for = len(self._sizes)
        policy, nbytes = self._plan
        model.arena.begin(nbytes)
        if model.arena.buffer is not self._arena:  # captured launches know addresses that are no longer used
            self._arena = model.arena.buffer
            for one in self._classes.values():
                one.replay = None
        return policy

    def _class_for(self, size: PassSize, on_host: PackedPass) -> _Class:
        if size not in self._classes:
            parcel, device = Parcel(on_host.tensors()), self._model.device
            staged = [
                torch.empty(parcel.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(STAGES)
            ]
            buffer = torch.empty(parcel.nbytes, dtype=torch.uint8, device=device)
            self._classes[size] = _Class(parcel, staged, buffer)
        return self._classes[size]

    def _room_for_prefix(self, tokens: int) -> Tensor:
        config, model = self._model.config, self._model
        shape = (config.num_layers, 2, tokens, config.num_kv_heads, config.head_dim)
        return torch.zeros(shape, dtype=model.dtype, device=model.device)

    def _fill_prefix(self, tree: TokenTree, tokens: int) -> None:
        """Bring the keys and values of the tree's prefix to where every class expects them."""
        if tokens > self._prefix.shape[2]:
            self._prefix, self._holds = self._room_for_prefix(tokens), ()
            self._classes.clear()
        units = self._model.prefix_cache.units(tree.units)
        paths = tuple(unit.path for unit in tree.units)
        if paths != self._holds:
            start = 0
            for unit in units:
                self._prefix[:, :, start : start + unit.shape[2]] = unit
                start += unit.shape[2]
            self._holds = paths

    def _try_to_capture(self, one: _Class, on_host: PackedPass, policy: str | None) -> None:
        assert self._capture is not None
        try:
            one.replay, one.numbers = self._capture(lambda: self._run(one, on_host, policy))
        except RuntimeError as error:
            self._capture = None
            told = f"No CUDA graph can be had, launches go one by one: {first_line(error)}"
            warnings.warn(told, GraphWarning, stacklevel=2)
