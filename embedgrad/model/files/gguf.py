"""Reads a GGUF file: its metadata, and its tensors from a memory mapping, dequantised one at a time.

The format is defined in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. This module parses the header itself
because every size in it is untrusted. The `gguf` package dequantises the blocks.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from embedgrad.model.families import GGUF_ARCHITECTURES
from embedgrad.model.files.recognise import GGUF_MAGIC
from embedgrad.model.native_matrices import is_built
from embedgrad.model.quantised import QUANTISED, BlockWeight
from embedgrad.model.rope import Divisors
from embedgrad.util.errors import ModelError
from embedgrad.util.shown import short

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_DEEPEST_ARRAY = 4
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Blocks in a row of the array that dequantize() gets. It works on 16 rows at a time, and 16 * 64 blocks of 32 elements
# stay in the second-level cache.
_BLOCKS_PER_ROW = 64

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_DIVISORS = "rope_freqs.weight"
# LongRoPE's divisors for texts within the original context, and for longer ones.
LONGROPE_DIVISORS = "rope_factors_short.weight", "rope_factors_long.weight"
_MOST_DIVISORS = 65536


@dataclass(frozen=True)
class _Entry:
    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # in torch's order: the number of matrix rows first
    start: int  # bytes from the beginning of the file
    size: int  # bytes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file has it: its name there, type, shape in torch's order, and bytes as uint8 [n]."""

    name: str
    kind: str
    shape: tuple[int, ...]
    data: torch.Tensor


class GgufFile:
    """The TensorSource of a GGUF file. metadata: the file's key-value pairs."""

    def __init__(self, path: Path) -> None:
        """Parses and checks the header. Raises ModelError."""
        self.path = path
        try:
            with path.open("rb") as file:
                # A private mapping of the whole file. A page is read when it is first used.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if path.stat().st_size else None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        self._mapped = mapped
        self._data = torch.empty(0) if mapped is None else torch.frombuffer(mapped, dtype=torch.uint8)
        try:
            self.metadata, entries, self._spans = _parse(memoryview(b"" if mapped is None else mapped))
        except (_Malformed, struct.error, UnicodeDecodeError, OverflowError) as error:
            raise ModelError(f"{path} is not a complete GGUF file ({error}); fetch it again.") from error
        except _Unsupported as error:
            raise ModelError(f"{path} {error}.") from error
        if str(self.metadata.get("split.count", 0)) not in ("0", "1"):
            raise ModelError(f"{path} is one part of a split model; join the parts with llama-gguf-split --merge.")
        self._check_kinds(entries)
        self._stored = dict(entries)
        names_of_divisors = (ROPE_DIVISORS, *LONGROPE_DIVISORS)
        plain, short_factors, long_factors = (entries.pop(name, None) for name in names_of_divisors)
        self._divisors = plain if short_factors is None else short_factors, long_factors
        family = self.metadata.get("general.architecture")
        kind = GGUF_ARCHITECTURES.get(family) if isinstance(family, str) else None
        self._permuted, names = kind is not None and kind.gguf_permuted, {} if kind is None else kind.gguf_names
        self._entries = {_canonical(name, names): entry for name, entry in entries.items()}
        if len(self._entries) != len(entries):
            raise ModelError(f"{path} holds two tensors of the same name.")
        self._heads: dict[str, int] = {}

    def set_heads(self, heads: int, kv_heads: int) -> None:
        """Sets the numbers of query and key heads, by which q and k are permuted in files of some families."""
        if self._permuted:
            self._heads = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}

    def names(self) -> list[str]:
        return list(self._entries)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def rope_divisors(self) -> Divisors:
        """Raises ModelError for a wrong shape."""
        short, long = (self._vector(entry) for entry in self._divisors)
        return short, long

    def _vector(self, entry: _Entry | None) -> tuple[float, ...]:
        if entry is None:
            return ()
        if len(entry.shape) > 1 or entry.shape[0] > _MOST_DIVISORS:
            raise ModelError(
                f"{self.path}: {ROPE_DIVISORS} has shape {list(entry.shape)}; it should be a vector of half a head."
            )
        return tuple(self._values(entry, self._blocks(entry)).flatten().tolist())

    def get(self, name: str) -> torch.Tensor:
        """The tensor. F32, F16, BF16 and F64 are views into the mapping, or copies if permuted; others are float32."""
        entry = self._entries[name]
        return self._values(entry, self._unpermuted(name, self._blocks(entry)))

    def first_row(self, name: str) -> torch.Tensor:
        entry = self._entries[name]  # the permutation of q and k leaves the first row in its place
        shape = (1, entry.shape[-1]) if len(entry.shape) > 1 else entry.shape
        return self._values(replace(entry, shape=shape), self._blocks(entry)[:1]).flatten()

    def stored_as(self, name: str) -> str | None:
        return self._entries[name].kind.name

    def raw(self, name: str) -> tuple[str, torch.Tensor]:
        """(name of the type, stored bytes as uint8 [matrix rows, bytes per matrix row]), in the model's row order."""
        entry = self._entries[name]
        return entry.kind.name, self._unpermuted(name, self._blocks(entry))

    def release(self, name: str) -> None:
        """Drops the pages that only this quantised tensor lies in; they are read again when they are used."""
        entry, page = self._entries[name], mmap.PAGESIZE
        first, last = -(-entry.start // page) * page, (entry.start + entry.size) // page * page
        quantised = entry.kind.name not in _PLAIN
        if self._mapped is not None and last > first and quantised and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED, first, last - first)

    def pairs(self) -> dict[str, bytes]:
        """For each key of the metadata the bytes of its value, which begin with the number of its type."""
        return {key: self._data[begin:end].numpy().tobytes() for key, (begin, end) in self._spans.items()}

    def stored(self) -> list[StoredTensor]:
        """All tensors in the file's order, with the file's names and order of rows."""
        return [
            StoredTensor(name, e.kind.name, e.shape, self._data[e.start : e.start + e.size])
            for name, e in self._stored.items()
        ]

    def _blocks(self, entry: _Entry) -> torch.Tensor:
        rows = _product(entry.shape[:-1])
        return self._data[entry.start : entry.start + entry.size].view(rows, entry.size // rows)

    def _unpermuted(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Undoes the permutation of q and k: matrix row (head, pair, half) in the file is (head, half, pair) here.

        `rows` holds values or blocks.
        """
        part = name.removesuffix(".weight").removesuffix(".bias")
        heads = next((count for end, count in self._heads.items() if part.endswith(end)), None)
        if heads is None:
            return rows
        shape = rows.shape
        if name.endswith(".bias"):  # the file stores a vector as one row
            rows = rows.view(self._entries[name].shape[0], -1)
        count, width = rows.shape
        return rows.view(heads, count // heads // 2, 2, width).transpose(1, 2).reshape(shape)

    def _values(self, entry: _Entry, blocks: torch.Tensor) -> torch.Tensor:
        plain = _PLAIN.get(entry.kind.name)
        if plain is not None:
            return blocks.view(plain).view(entry.shape)
        if entry.kind.name in QUANTISED and is_built():
            columns = entry.shape[-1]
            matrix = BlockWeight(entry.kind.name, blocks, (_product(entry.shape[:-1]), columns))
            return matrix.dequantize().view(entry.shape)
        block_bytes = GGML_QUANT_SIZES[entry.kind][1]
        flat = blocks.reshape(-1)
        wide = _BLOCKS_PER_ROW * block_bytes
        split = flat.numel() // wide * wide
        parts = [flat[:split].view(-1, wide), flat[split:].view(-1, block_bytes)]
        with np.errstate(all="ignore"):
            values = [torch.from_numpy(dequantize(part.numpy(), entry.kind)) for part in parts if part.numel()]
        return (values[0] if len(values) == 1 else torch.cat([v.flatten() for v in values])).view(entry.shape)

    def _check_kinds(self, entries: dict[str, _Entry]) -> None:
        for kind in {entry.kind for entry in entries.values()}:
            if kind.name in _PLAIN:
                continue
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
            except NotImplementedError:
                name = next(name for name, entry in entries.items() if entry.kind == kind)
                raise ModelError(
                    f"{self.path}: {name} has type {kind.name}, which is unsupported: the gguf package cannot "
                    f"dequantise it; take a file of another type, such as Q8_0 or Q4_K_M."
                ) from None


class _Malformed(Exception):
    """The header is malformed; the message says how in a few words."""


class _Unsupported(Exception):
    """The file may be whole, but is of a kind that is not read; the message continues a sentence that names it."""


class _Reader:
    """Reads little-endian values with bounds checks. at: offset of the next byte."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def left(self) -> int:
        return len(self.data) - self.at

    def scalar(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def bytes(self, count: int) -> memoryview:
        if count > self.left():
            raise _Malformed(f"{count} bytes announced at byte {self.at}, {self.left()} left")
        self.at += count
        return self.data[self.at - count : self.at]

    def string(self) -> str:
        return str(self.bytes(self.scalar("<Q")), "utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(depth + 1)
        layout = _SCALARS.get(kind)
        if layout is None:
            raise _Malformed(f"value type {kind} at byte {self.at} is unknown")
        return self.scalar(layout)

    def _array(self, depth: int) -> Any:
        """An array. Numbers are a view of the file, so that a wrong count takes no memory; other items are a list."""
        kind, count = self.scalar("<I"), self.scalar("<Q")
        layout = _SCALARS.get(kind)
        if layout is not None:
            stride = struct.calcsize(layout)
            return np.frombuffer(self.bytes(count * stride), dtype=layout)
        if depth > _DEEPEST_ARRAY:
            raise _Malformed(f"arrays nested deeper than {_DEEPEST_ARRAY}")
        if count * 8 > self.left():  # a string or an array has at least its length field of 8 bytes
            raise _Malformed(f"{count} items announced at byte {self.at}, {self.left()} bytes left")
        if kind == _STRING:
            return self._strings(count)
        return [self.value(kind, depth) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        """`count` strings. A vocabulary has 100,000; this loop takes a quarter of the time that `string` would take."""
        data, at, end, length = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            (size,) = length(data, at)
            at += 8
            if size > end - at:
                raise _Malformed(f"{size} bytes announced at byte {at}, {end - at} left")
            found.append(str(data[at : at + size], "utf-8"))
            at += size
        self.at = at
        return found


def _parse(data: memoryview) -> tuple[dict[str, Any], dict[str, _Entry], dict[str, tuple[int, int]]]:
    """(metadata, tensors, for each key the place of its type and value)."""
    reader = _Reader(data)
    if bytes(data[:4]) != GGUF_MAGIC:
        raise _Malformed("it does not begin with GGUF")
    reader.at = 4
    version = reader.scalar("<I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in (2, 3):
            raise _Unsupported("is a big-endian GGUF file, which is not supported; convert the model for this machine")
        raise _Unsupported(
            f"has GGUF version {version}, which is not supported; supported are 2 and 3: convert it anew"
        )
    tensors, pairs = reader.scalar("<Q"), reader.scalar("<Q")
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in _counted(pairs, 12, reader):
        key = reader.string()
        if key in metadata:
            raise _Malformed(f"key {short(key)} twice")
        begin = reader.at
        metadata[key] = reader.value(reader.scalar("<I"))
        spans[key] = begin, reader.at
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise _Malformed(f"general.alignment is {short(alignment)}")
    infos: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in _counted(tensors, 32, reader):
        name, dimensions = reader.string(), reader.scalar("<I")
        if not 1 <= dimensions <= 4:
            raise _Malformed(f"{short(name)} has {dimensions} dimensions")
        shape = tuple(reader.scalar("<Q") for _ in range(dimensions))[::-1]
        infos.append((name, shape, reader.scalar("<I"), reader.scalar("<Q")))
    begin = -(-reader.at // alignment) * alignment
    entries: dict[str, _Entry] = {}
    for name, shape, kind, offset in infos:
        if name in entries:
            raise _Malformed(f"tensor {short(name)} twice")
        entries[name] = _entry(name, shape, kind, offset, alignment, begin, len(data))
    _check_places(entries, alignment, begin, len(data))
    return metadata, entries, spans


def _check_places(entries: dict[str, _Entry], alignment: int, begin: int, end: int) -> None:
    """Raises _Malformed unless the tensors follow one another, with no more than padding between and behind them.

    A tensor whose offset is wrong would be read from the numbers of another one, and a tensor that the header lost may
    be optional (a head that is not tied, frequencies of the rotary embedding).
    """
    expected, before = begin, ""
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != expected:
            told = f"{short(name)} begins at byte {entry.start}, but the tensors before it end at byte {expected}"
            raise _Malformed(f"{told}; {short(name)} and {short(before)} overlap" if entry.start < expected else told)
        expected, before = -(-(entry.start + entry.size) // alignment) * alignment, name
    if entries and end > expected:
        raise _Malformed(f"{end - expected} bytes behind the last tensor belong to none")


def _counted(count: int, least: int, reader: _Reader) -> range:
    """range(count). Raises _Malformed where the file cannot hold `count` items of at least `least` bytes."""
    if count * least > reader.left():
        raise _Malformed(f"{count} entries announced, {reader.left()} bytes left")
    return range(count)


def _entry(name: str, shape: tuple[int, ...], kind: int, offset: int, alignment: int, begin: int, end: int) -> _Entry:
    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        raise _Unsupported(
            f"holds {short(name)} in type {kind}, which is unsupported (the gguf package here does not know it); take "
            f"a file of another type, such as Q8_0 or Q4_K_M"
        ) from None
    values, size = GGML_QUANT_SIZES[known]
    if min(shape) < 1 or shape[-1] % values:
        raise _Malformed(f"{short(name)} has shape {list(shape)}, impossible for {known.name}")
    length = _product(shape) // values * size
    if offset % alignment or begin + offset + length > end:
        raise _Malformed(f"{short(name)} lies outside the file")
    return _Entry(known, shape, begin + offset, length)


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _canonical(name: str, layer_names: dict[str, str]) -> str:
    """The Hugging Face name of a tensor. A name without counterpart stays unchanged; `read_checkpoint` refuses it."""
    stem, dot, suffix = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}{dot}{suffix}"
    block, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if block == "blk" and layer.isdecimal() and part in layer_names:
        return f"model.layers.{int(layer)}.{layer_names[part]}{dot}{suffix}"
    return name
