"""Weight streaming: layers that do not fit on the device stay in host memory and are copied when they are needed.

There are two buffers on the device; layer n goes into buffer n mod 2. While one layer is computed, the next layer is
prefetched on a separate stream: the layer above in the forward pass, the layer below in the backward pass. Where the
forward pass turns into the backward pass, the first two layers are already in the buffers. On a CPU the same copies are
made without streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from embedgrad.model.weights import LayerWeights
from embedgrad.util.errors import ConfigError

ALIGNMENT = 256  # bytes; that of a separately allocated tensor, so that kernels see the same alignment


def placed(
    layers: Sequence[LayerWeights], always: Sequence[Tensor], device: torch.device, limit: int
) -> Sequence[LayerWeights]:
    """The layers on `device`: the first ones stay there as far as they fit, the others are streamed.

    layers: layers in host memory. always: the other tensors on the device. limit: bytes that all of them may take on
    the device. Raises ConfigError where `always` and two layers take more than `limit`.
    """
    sizes = [_packed_size(layer) for layer in layers]
    room = limit - sum(x.nbytes for x in always)
    resident = len(layers)
    if sum(sizes) > room:
        resident = 0
        while sum(sizes[: resident + 1]) + _two_largest(sizes[resident + 1 :]) <= room:
            resident += 1
        needed = limit - room + _two_largest(sizes)
        if needed > limit:
            raise ConfigError(
                f"max_device_memory is {limit:,} bytes, but the embedding, the head and two blocks take {needed:,}; "
                "allow that much, or use weights int8 or int4."
            )
    on_device = [layer.moved(lambda x: x.to(device)) for layer in layers[:resident]]
    return StreamedLayers(on_device, layers[resident:], device) if resident < len(layers) else on_device


def _two_largest(sizes: Sequence[int]) -> int:
    return 2 * max(sizes, default=0)


def _packed_size(layer: LayerWeights) -> int:
    return sum(_aligned(x.nbytes) for x in layer.tensors())


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _views(buffer: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that returns, for one tensor after another, its place in `buffer` as a view."""
    start = 0

    def place(x: Tensor) -> Tensor:
        nonlocal start
        view = buffer[start : start + x.nbytes].view(x.dtype).view(x.shape)
        start += _aligned(x.nbytes)
        return view

    return place


class StreamedLayers(Sequence[LayerWeights]):
    """The layers of a model. The first ones are always on the device, the others only while they are used.

    `layers[i]` is valid until another layer is requested. `copies` counts the copies to the device.
    """

    def __init__(
        self, resident: Sequence[LayerWeights], streamed: Sequence[LayerWeights], device: torch.device
    ) -> None:
        self._resident = list(resident)
        self._cuda = device.type == "cuda"
        self._host = [self._flat(layer) for layer in streamed]
        largest = max(len(block) for block in self._host)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self._layers = [layer.moved(_views(self._buffers[n % 2])) for n, layer in enumerate(streamed)]
        self._holds = [-1, -1]
        self._last = 0
        self.copies = 0
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._ready = [torch.cuda.Event(), torch.cuda.Event()]

    @property
    def device_bytes(self) -> int:
        """Bytes that the layers take on the device."""
        return sum(x.nbytes for layer in self._resident for x in layer.tensors()) + sum(map(len, self._buffers))

    def _flat(self, layer: LayerWeights) -> Tensor:
        block = torch.empty(_packed_size(layer), dtype=torch.uint8, pin_memory=self._cuda)
        place = _views(block)
        layer.moved(lambda x: place(x).copy_(x))
        return block

    def __len__(self) -> int:
        return len(self._resident) + len(self._layers)

    def __iter__(self) -> Iterator[LayerWeights]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerWeights]: ...
    def __getitem__(self, index: int | slice) -> LayerWeights | Sequence[LayerWeights]:
        """The layer. Also starts to prefetch the next one, above or below, by the direction since the last call."""
        if isinstance(index, slice):
            raise TypeError("streamed blocks are asked for one at a time")
        index = range(len(self))[index]
        ahead, self._last = (-1 if index < self._last else 1), index
        n = index - len(self._resident)
        if n >= 0:
            self._bring(n)
            if self._cuda:
                torch.cuda.current_stream().wait_event(self._ready[n % 2])
        if 0 <= n + ahead < len(self._layers):
            self._bring(n + ahead)
        return self._layers[n] if n >= 0 else self._resident[index]

    def _bring(self, n: int) -> None:
        """Starts to copy streamed layer n into its buffer, unless this has been done before."""
        slot, block = n % 2, self._host[n]
        if self._holds[slot] == n:
            return
        self._holds[slot] = n
        self.copies += 1
        into = self._buffers[slot][: len(block)]
        if not self._cuda:
            into.copy_(block)
            return
        # Kernels that are already launched may still read this buffer. Later ones read the other buffer.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            into.copy_(block, non_blocking=True)
            self._ready[slot].record(self._stream)
