"""Frozen matrices in int8 and int4: the stored form, GGUF's blocks brought into it, and quantisers.

A weight W [N, K] is cut into groups of `group` consecutive elements of a row; element w of a group is

    w = scale · (q − zero) + offset        zero = 8 (int4) or 0 (int8) without offsets; with offsets, zero = 0

int8: q is a signed byte, packed [N, K′]. int4: q is 0 to 15, two to a byte, packed [N, K′/2]: byte j of a row has
element j in its low and element K′/2 + j in its high half. So both halves of a tile of bytes are tiles of consecutive
columns, and neither direction of the product has to shuffle columns. K′ is K rounded up to a whole number of groups
(int4: an even number of groups); no value of the padding is ever used.

GGUF's Q8_0, Q4_0 and Q4_1 (llama.cpp, ggml-common.h: block_q8_0, block_q4_0, block_q4_1) keep every bit of their
scales, minima and quants. In fp32, scale · (q − zero) is exact (at most 11 + 8 bits) and + offset rounds once, so that
the dequantised values are those of the file, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

_Q8_0, _Q4_0, _Q4_1 = 34, 18, 20
"""Bytes of a GGUF block of 32 elements: fp16 scale (Q4_1: and fp16 minimum), then 32 signed bytes or 16 of halves."""

_SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Fractions of a group's range that the int4 quantiser tries: clipping an outlier can pay for the others' precision."""


@dataclass(frozen=True)
class PackedWeight:
    """A quantised matrix [N, K]; see the module for the layout.

    packed: int8 [N, K′] or uint8 [N, K′/2]; scales and offsets [N, K′/group] float16 or float32; shape: (N, K).
    """

    kind: Literal["int8", "int4"]
    packed: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    group: int
    shape: tuple[int, int]

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "PackedWeight":
        """The same weight with `move` of every tensor, in the order of `tensors`."""
        packed, scales = move(self.packed), move(self.scales)
        return replace(self, packed=packed, scales=scales, offsets=None if self.offsets is None else move(self.offsets))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedWeight":
        """The same weight with its tensors on `device`."""
        return self.moved(lambda x: x.to(device, non_blocking=non_blocking))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What is stored: packed, scales, offsets."""
        return self.packed, self.scales, self.offsets

    def rows(self, start: int, stop: int) -> "PackedWeight":
        """The rows [start, stop) as a weight of its own, sharing the storage."""
        offsets = None if self.offsets is None else self.offsets[start:stop]
        packed = self.packed[start:stop]
        return PackedWeight(
            self.kind, packed, self.scales[start:stop], offsets, self.group, (len(packed), self.shape[1])
        )

    @property
    def bytes(self) -> int:
        """Bytes stored."""
        return sum(x.numel() * x.element_size() for x in self.tensors() if x is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W [N, K]: computed in float32 (float64 where asked for), then converted."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        q = self.packed.to(wide) if self.kind == "int8" else _unpacked(self.packed).to(wide)
        grouped = q.unflatten(1, (-1, self.group))
        if self.kind == "int4" and self.offsets is None:
            grouped = grouped - 8
        w = grouped * self.scales.to(wide)[:, :, None]
        if self.offsets is not None:
            w = w + self.offsets.to(wide)[:, :, None]
        return w.flatten(1)[:, : self.shape[1]].to(dtype)


def stacked(parts: list[PackedWeight]) -> PackedWeight:
    """Weights with the same layout on top of each other (q, k and v; gate and up), as one.

    Raises ValueError where kind, group, width or the presence of offsets differ.
    """
    first = parts[0]
    layout = (first.kind, first.group, first.shape[1], first.offsets is None)
    for part in parts[1:]:
        if (part.kind, part.group, part.shape[1], part.offsets is None) != layout:
            raise ValueError(f"weights of layout {layout} and {part.kind, part.group, part.shape[1]} cannot be stacked")
    scales = torch.cat([p.scales.to(torch.promote_types(first.scales.dtype, p.scales.dtype)) for p in parts])
    offsets = None if first.offsets is None else torch.cat([p.offsets for p in parts if p.offsets is not None])
    rows = sum(p.shape[0] for p in parts)
    return PackedWeight(
        first.kind, torch.cat([p.packed for p in parts]), scales, offsets, first.group, (rows, first.shape[1])
    )


def from_q8_0(blocks: torch.Tensor) -> PackedWeight:
    """GGUF's Q8_0 rows [N, 34 · K/32] uint8: per block an fp16 scale and 32 signed bytes."""
    parts = _blocks(blocks, _Q8_0, "Q8_0")
    scales, q = _half(parts[:, :, :2]), parts[:, :, 2:].contiguous().view(torch.int8)
    return PackedWeight("int8", q.flatten(1), scales, None, 32, (len(blocks), q[0].numel() if len(q) else 0))


def from_q4_0(blocks: torch.Tensor) -> PackedWeight:
    """GGUF's Q4_0 rows [N, 18 · K/32] uint8: per block an fp16 scale and 16 bytes, w = scale · (q − 8)."""
    parts = _blocks(blocks, _Q4_0, "Q4_0")
    return _from_halves(parts[:, :, 2:], _half(parts[:, :, :2]), None)


def from_q4_1(blocks: torch.Tensor) -> PackedWeight:
    """GGUF's Q4_1 rows [N, 20 · K/32] uint8: per block fp16 scale and minimum and 16 bytes, w = scale · q + minimum."""
    parts = _blocks(blocks, _Q4_1, "Q4_1")
    return _from_halves(parts[:, :, 4:], _half(parts[:, :, :2]), _half(parts[:, :, 2:4]))


def quantize_int8(w: torch.Tensor, group: int = 32) -> tuple[PackedWeight, float]:
    """W [N, K] in int8, symmetric per group (scale = largest magnitude/127), and ‖W − Ŵ‖/‖W‖ (Frobenius).

    Raises ValueError where W is not finite or not a matrix.
    """
    grouped = _grouped(w, group, 1)
    scales = _stored(grouped.abs().amax(-1) / 127)
    q = torch.where(scales[:, :, None] > 0, (grouped / scales.float()[:, :, None]).round().clamp(-127, 127), 0)
    weight = PackedWeight("int8", q.to(torch.int8).flatten(1), scales, None, group, (w.shape[0], w.shape[1]))
    return weight, _error(w, weight)


def quantize_int4(w: torch.Tensor, group: int = 32) -> tuple[PackedWeight, float]:
    """W [N, K] in int4 with an offset per group, and ‖W − Ŵ‖/‖W‖ (Frobenius).

    Per group the range is shrunk by each of a few factors and the one with the least squared error stays. Raises
    ValueError where W is not finite or not a matrix.
    """
    grouped = _grouped(w, group, 2)
    low, high = grouped.amin(-1), grouped.amax(-1)
    middle, half = (high + low) / 2, (high - low) / 2
    scales = _stored(half / 7.5)
    best = torch.full_like(middle, float("inf"))
    q, scale, offset = torch.zeros_like(grouped), torch.zeros_like(scales), torch.zeros_like(scales)
    is_padding = torch.arange(grouped[0].numel(), device=w.device).view(grouped[0].shape) >= w.shape[1]
    for shrink in _SHRINK:
        try_scale = (half * shrink / 7.5).to(scales.dtype)
        try_offset = (middle - half * shrink).to(scales.dtype)
        wide_scale, wide_offset = try_scale.float()[:, :, None], try_offset.float()[:, :, None]
        steps = torch.where(wide_scale > 0, (grouped - wide_offset) / wide_scale, 0)
        try_q = steps.round().clamp(0, 15)
        error = (try_q * wide_scale + wide_offset - grouped).square().masked_fill_(is_padding, 0).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, try_scale, scale), torch.where(better, try_offset, offset)
        q = torch.where(better[:, :, None], try_q, q)
    packed = _packed(q.to(torch.uint8).flatten(1))
    weight = PackedWeight("int4", packed, scale, offset, group, (w.shape[0], w.shape[1]))
    return weight, _error(w, weight)


def _error(w: torch.Tensor, weight: PackedWeight) -> float:
    size = float(w.double().norm())
    return float((weight.dequantize(torch.float64) - w.double()).norm()) / size if size > 0 else 0.0


def _stored(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float16, or float32 where one of them would lose bits or overflow there."""
    used = scales[scales > 0]
    largest = torch.finfo(torch.float16).max / 16  # so that minima and maxima of a group fit, too
    fits = not used.numel() or bool((used.min() >= _SMALLEST_NORMAL) & (used.max() <= largest))
    return scales.to(torch.float16) if fits else scales


def _grouped(w: torch.Tensor, group: int, multiple: int) -> torch.Tensor:
    """W as [N, groups, group] float32, padded with the row's last element to `multiple` groups."""
    if w.ndim != 2 or not w.shape[0] or not w.shape[1]:
        raise ValueError(f"a weight of shape {list(w.shape)} cannot be quantised; it must be a matrix with elements")
    if not bool(w.isfinite().all()):
        raise ValueError("a weight with infinite or NaN elements cannot be quantised")
    missing = -w.shape[1] % (group * multiple)
    wide = w.float()
    if missing:
        wide = torch.cat([wide, wide[:, -1:].expand(-1, missing)], dim=1)
    return wide.unflatten(1, (-1, group))


def _blocks(blocks: torch.Tensor, size: int, name: str) -> torch.Tensor:
    if blocks.dtype != torch.uint8 or blocks.ndim != 2 or blocks.shape[1] % size:
        raise ValueError(f"{name} rows are uint8 [N, {size}·blocks]; given: {blocks.dtype} {list(blocks.shape)}")
    return blocks.unflatten(1, (-1, size))


def _half(two: torch.Tensor) -> torch.Tensor:
    """Pairs of bytes [..., 2] as float16 [...]; GGUF is little endian, as torch is."""
    return two.contiguous().view(torch.float16).squeeze(-1)


def _from_halves(bytes16: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> PackedWeight:
    """GGUF's blocks of 16 bytes (elements 0 to 15 low, 16 to 31 high) in our order; an odd number of them is padded."""
    q = torch.cat([bytes16 & 15, bytes16 >> 4], dim=-1).flatten(1)
    shape = (q.shape[0], q.shape[1])
    if scales.shape[1] % 2:
        q = torch.nn.functional.pad(q, (0, 32))
        scales = torch.nn.functional.pad(scales, (0, 1))
        offsets = None if offsets is None else torch.nn.functional.pad(offsets, (0, 1))
    return PackedWeight("int4", _packed(q), scales.contiguous(), offsets, 32, shape)


def _packed(q: torch.Tensor) -> torch.Tensor:
    """[N, K′] of 0 to 15 as [N, K′/2] bytes: the first half of the columns low, the second high."""
    low, high = q.chunk(2, dim=1)
    return (low | high << 4).contiguous()


def _unpacked(packed: torch.Tensor) -> torch.Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=1)
