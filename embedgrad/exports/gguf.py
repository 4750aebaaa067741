"""The target `gguf`: a file for llama.cpp with the prompts as vocabulary, from a GGUF file or a folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from embedgrad.exports.gguf_file import ALIGNMENT, Typed, nbytes, stored_rows, write_gguf_file
from embedgrad.exports.gguf_from_folder import folder_as_gguf
from embedgrad.exports.same_ids import conversations, right_names, wrong_names
from embedgrad.exports.source import NamedPrompt, Source
from embedgrad.exports.tensor_file import Entry
from embedgrad.exports.vocabulary import Vocabulary, vocabulary
from embedgrad.model.files.gguf import StoredTensor
from embedgrad.model.tokenizer import Tokenizer
from embedgrad.util.errors import ExportError

NORMAL, CONTROL, UNUSED = 1, 3, 5
KEPT = ("F32", "F16", "BF16", "Q8_0")
"""Types of a table that are kept; others become Q8_0."""
_TABLE, _HEAD = "token_embd.weight", "output.weight"
_ROWS = 8192  # rows of a table that are converted at a time


class Parts:
    """A GGUF file in parts, of a file or made of a folder. metadata: decoded. pairs: encoded. tensors: as stored."""

    def __init__(self, source: Source) -> None:
        if source.gguf is not None:
            self.metadata: dict[str, Any] = dict(source.gguf.metadata)
            self.pairs = source.gguf.pairs()
            self.tensors: list[StoredTensor] = source.gguf.stored()
        else:
            self.metadata, self.pairs, self.tensors = folder_as_gguf(source)
        self.alignment = int(self.metadata.get("general.alignment", ALIGNMENT))

    def put(self, key: str, kind: str, value: Any) -> None:
        """Sets a value of the metadata."""
        self.pairs[key] = Typed(kind, value).encoded()
        array = kind.startswith("[") and kind != "[str]"
        self.metadata[key] = np.array(value) if array else value


def write_gguf(
    source: Source, prompts: Sequence[NamedPrompt], out: Path, *, untie: bool
) -> tuple[Vocabulary, dict[str, Any]]:
    """Writes the file `out`. Returns the new vocabulary and facts. Raises ExportError."""
    parts = Parts(source)
    words = _write_vocabulary(source, prompts, parts)
    table = next(t for t in parts.tensors if t.name == _TABLE)
    kind = _table_kind(table)
    rows = stored_rows(words.embeddings, kind, exact=True)
    if kind == "F16" and not bool(words.embeddings.half().isfinite().all()):
        raise ExportError("a row of the prompt is too large for the embedding table's type, F16.")
    error = float(((read_rows(rows, kind) - words.embeddings).norm(dim=1) / words.embeddings.norm(dim=1)).max())
    tied = not any(t.name == _HEAD for t in parts.tensors)
    entries = [_entry(t, words, kind, rows, grown=words.rows) for t in parts.tensors]
    if tied and untie and source.config.kind.gguf_tied:
        raise ExportError(
            f"llama.cpp's {source.config.kind.gguf} has no head of its own beside the embedding table; export without "
            f"untie."
        )
    if tied and untie:
        zeros = stored_rows(torch.zeros_like(words.embeddings), kind)
        entries.append(_table_entry(_HEAD, table, words, kind, zeros))
    write_gguf_file(out, parts.pairs, entries, parts.alignment)
    facts = {
        "type of the embedding table": kind if kind == table.kind else f"{kind}, in the model {table.kind}",
        "rows": words.rows,
        "new tokens": len(words.ids),
        "largest relative rounding error of a prompt row": error,
        "head": "tied" if tied and not untie else "untied",
    }
    return words, facts


def read_rows(blocks: np.ndarray, kind: str) -> Tensor:
    """Rows of a ggml type, uint8 [n, bytes], in float32."""
    return torch.from_numpy(np.ascontiguousarray(dequantize(blocks, GGMLQuantizationType[kind]), np.float32))


def _write_vocabulary(source: Source, prompts: Sequence[NamedPrompt], parts: Parts) -> Vocabulary:
    """Puts the new tokens into the metadata of `parts`, and tries them on conversations. Raises ExportError."""
    metadata = dict(parts.metadata)
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens += [f"[PAD{i}]" for i in range(len(tokens), source.config.vocab_size)]
    types = [int(t) for t in metadata["tokenizer.ggml.token_type"]]
    types += [UNUSED] * (len(tokens) - len(types))
    special = metadata.get("tokenizer.ggml.model") == "gpt2"
    first = 1 + max(i for i, kind in enumerate(types) if kind != UNUSED)

    def attempt(spaced: Collection[str]) -> tuple[Vocabulary, dict[str, str]]:
        known = set(tokens)
        words = vocabulary(source, prompts, special=special, first_id=first, known=known, spaced=spaced)
        _put_tokens(parts, words, tokens, types, source)
        tokenizer = Tokenizer.from_gguf(parts.metadata, "the exported file")
        return words, wrong_names(tokenizer, words, conversations(source, prompts, words))

    words = right_names(attempt)
    # llama.cpp puts a BOS token before a conversation, unless the template has written one.
    bos = source.tokenizer.bos_id
    if source.tokenizer.adds_bos and any(each.ids[0] != bos for each in conversations(source, prompts, words, ("x",))):
        parts.put("tokenizer.ggml.add_bos_token", "bool", False)
    return words


def _put_tokens(parts: Parts, words: Vocabulary, tokens: list[str], types: list[int], source: Source) -> None:
    count = max(len(tokens), words.rows)
    new_tokens = tokens + [""] * (count - len(tokens))
    new_types = types + [UNUSED] * (count - len(types))
    for each in words.tokens:
        for text, id in zip(each.texts, each.ids, strict=True):
            new_tokens[id], new_types[id] = text, CONTROL if words.special else NORMAL
    parts.put("tokenizer.ggml.tokens", "[str]", new_tokens)
    parts.put("tokenizer.ggml.token_type", "[i32]", new_types)
    scores = parts.metadata.get("tokenizer.ggml.scores")
    if scores is not None:
        before = [float(score) for score in scores][: len(tokens)]
        lowest = min(before, default=0.0) - 1  # below all merges
        parts.put("tokenizer.ggml.scores", "[f32]", before + [lowest] * (count - len(before)))
    old = parts.metadata.get("tokenizer.ggml.suppress_tokens")
    suppressed = sorted({*([] if old is None else map(int, old)), *words.ids})
    parts.put("tokenizer.ggml.suppress_tokens", "[i32]", suppressed)
    parts.put("tokenizer.chat_template", "str", words.chat_template)
    size = f"{parts.metadata['general.architecture']}.vocab_size"
    if size in parts.metadata:
        parts.put(size, "u32", count)


def _table_kind(table: StoredTensor) -> str:
    if table.kind in KEPT:
        return table.kind
    return "F16" if table.shape[1] % 32 else "Q8_0"


def _entry(tensor: StoredTensor, words: Vocabulary, kind: str, rows: np.ndarray, grown: int) -> Entry:
    if tensor.name == _TABLE:
        return _table_entry(_TABLE, tensor, words, kind, rows)
    data = memoryview(tensor.data.numpy().data)
    if tensor.name == _HEAD and grown > tensor.shape[0]:
        zeros = bytes(nbytes(tensor.kind, (grown - tensor.shape[0], tensor.shape[1])))  # zero in every type
        shape = (grown, tensor.shape[1])
        return Entry(_HEAD, tensor.kind, shape, nbytes(tensor.kind, shape), lambda: [data, zeros])
    return Entry(tensor.name, tensor.kind, tensor.shape, len(data), lambda: [data])


def _table_entry(name: str, table: StoredTensor, words: Vocabulary, kind: str, rows: np.ndarray) -> Entry:
    """The embedding table [words.rows, d] with `rows` (stored as `kind`) at the new ids."""
    shape = (words.rows, table.shape[1])
    return Entry(name, kind, shape, nbytes(kind, shape), _pieces(table, words, kind, rows))


def _pieces(table: StoredTensor, words: Vocabulary, kind: str, rows: np.ndarray) -> Callable[[], Iterator[memoryview]]:
    ids = np.array(words.ids)
    blocks = table.data.numpy().reshape(table.shape[0], -1)

    def pieces() -> Iterator[memoryview]:
        for start in range(0, words.rows, _ROWS):
            stop = min(start + _ROWS, words.rows)
            piece = blocks[start:stop]
            if table.kind != kind and len(piece):
                piece = stored_rows(read_rows(piece, table.kind), kind)
            inside = (ids >= start) & (ids < stop)
            if inside.any() or len(piece) < stop - start:
                piece = np.concatenate([piece, np.zeros((stop - start - len(piece), rows.shape[1]), np.uint8)])
                piece[ids[inside] - start] = rows[inside]
            yield np.ascontiguousarray(piece).reshape(-1).data

    return pieces
