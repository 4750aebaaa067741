"""The weights of a model copy as safetensors: the embedding table with the prompts' rows, everything else unchanged."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedgrad.exports.source import EMBEDDING, HEAD, Source
from embedgrad.exports.tensor_file import Entry, stored_entries, tensor_entry, write_entries
from embedgrad.exports.vocabulary import Vocabulary
from embedgrad.model.files.safetensors import INDEX, SINGLE, files_of, text_name

_ROWS = 8192  # rows of a table that are handled at a time
_SHARD = 4 << 30  # bytes of a file, as transformers' default for large models
_FICLONE = 0x40049409  # Linux's ioctl that makes a copy-on-write clone of a file


def extended(table: Tensor, rows: int, ids: Sequence[int], values: Tensor) -> Iterator[Tensor]:
    """`table` [V, d] as a table of `rows` rows in which the rows `ids` are `values` [n, d] and other new ones zero."""
    values = values.to(table.dtype)
    place = torch.tensor(ids, dtype=torch.int64)
    for start in range(0, rows, _ROWS):
        stop = min(start + _ROWS, rows)
        piece = table[start:stop]
        inside = (place >= start) & (place < stop)
        if len(piece) < stop - start or bool(inside.any()):
            piece = torch.cat([piece, table.new_zeros(stop - start - len(piece), table.shape[1])])
            piece[place[inside] - start] = values[inside]
        yield piece


def rounding(rows: Tensor, dtype: torch.dtype) -> float:
    """The largest ‖row − row in `dtype`‖/‖row‖ of `rows` [n, d]; infinite where a row is not finite in `dtype`."""
    difference = (rows - rows.to(dtype).float()).norm(dim=1)
    error = float((difference / rows.norm(dim=1).clamp_min(1e-30)).max())
    return error if error == error else float("inf")


def copy_weights(source: Source, words: Vocabulary, out: Path, untie: bool) -> None:
    """Copies the files of a model folder. Files without a changed tensor are linked.

    Of a multimodal model the tensors of the text part are copied, by the text model's names.
    """
    table, rows = source.table, words.rows
    grown = rows > len(table)
    embedding = _entry(EMBEDDING, table, rows, words.ids, words.embeddings)
    changed = {EMBEDDING: embedding}
    if source.tied and not untie:
        changed[HEAD] = Entry(HEAD, embedding.kind, embedding.shape, embedding.nbytes, embedding.pieces)
    elif source.tied:
        changed[HEAD] = _entry(HEAD, table, rows, words.ids, torch.zeros_like(words.embeddings))
    elif grown:
        head = source.checkpoint.tensors.get(HEAD)
        changed[HEAD] = _entry(HEAD, head, rows, (), words.embeddings[:0])
    weight_map: dict[str, str] = {}
    total = 0
    paths, _ = files_of(source.path)
    for path in paths:
        entries, metadata = stored_entries(path)
        if source.is_composite:
            entries = [replace(entry, name=own) for entry in entries if (own := text_name(entry.name)) is not None]
        if not entries:
            continue
        names = [entry.name for entry in entries]
        new = [changed.get(entry.name, entry) for entry in entries]
        if EMBEDDING in names and source.tied and untie and HEAD not in names:
            new.append(changed[HEAD])
        if source.is_composite or any(entry.name in changed for entry in new):
            write_entries(out / path.name, new, metadata)
        else:
            link(path, out / path.name)
        weight_map |= {entry.name: path.name for entry in new}
        total += sum(entry.nbytes for entry in new)
    if (source.path / INDEX).is_file():
        _write_index(out, weight_map, total)


def convert_weights(source: Source, words: Vocabulary, out: Path, untie: bool, dtype: torch.dtype) -> None:
    """Writes the weights of a GGUF file, dequantised to `dtype`."""
    get, rows, none = source.checkpoint.tensors.get, words.rows, words.embeddings[:0]
    entries = []
    for name, shape in source.config.shapes().items():
        if name == EMBEDDING:
            entries.append(_entry(name, source.table.to(dtype), rows, words.ids, words.embeddings))
        elif name == HEAD:
            pieces = _made(get, name, lambda x: extended(x, rows, (), none))
            entries.append(tensor_entry(name, dtype, (rows, shape[1]), pieces))
        elif name.endswith("norm.weight") and source.config.kind.norm_offset:  # GGUF files hold the sum
            stored = _made(get, name, lambda x: iter([x.float() - source.config.kind.norm_offset]))
            entries.append(tensor_entry(name, dtype, shape, stored))
        else:
            entries.append(tensor_entry(name, dtype, shape, _made(get, name, lambda x: iter([x]))))
    if source.tied and untie:
        zeros = torch.zeros_like(words.embeddings)
        entries.append(_entry(HEAD, source.table.to(dtype), rows, words.ids, zeros))
    shards = _shards(entries)
    if len(shards) == 1:
        write_entries(out / SINGLE, entries)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_entries(out / name, shard)
        weight_map |= {entry.name: name for entry in shard}
    _write_index(out, weight_map, sum(entry.nbytes for entry in entries))


def link(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`: a hard link, else a copy-on-write clone, else a copy."""
    source = source.resolve()  # the hub's cache has symbolic links
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    try:
        with open(source, "rb") as old, open(target, "wb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
    except OSError:
        shutil.copyfile(source, target)


def _entry(name: str, table: Tensor, rows: int, ids: Sequence[int], values: Tensor) -> Entry:
    return tensor_entry(name, table.dtype, (rows, table.shape[1]), lambda: extended(table, rows, ids, values))


def _made(
    get: Callable[[str], Tensor], name: str, change: Callable[[Tensor], Iterator[Tensor]]
) -> Callable[[], Iterator[Tensor]]:
    """A function that reads the tensor only when it is written."""
    return lambda: change(get(name))


def _shards(entries: Sequence[Entry]) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > _SHARD:
            shards.append([])
        shards[-1].append(entry)
    return shards


def _write_index(out: Path, weight_map: dict[str, str], total: int) -> None:
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
