"""Opens a model's checkpoint: reads configuration and tokenizer, and checks the tensors' names and shapes."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from embedgrad.model.config import ModelConfig, is_composite
from embedgrad.model.fields import read_object
from embedgrad.model.files.gguf import GgufFile
from embedgrad.model.files.hub import name_of
from embedgrad.model.files.recognise import refuse_adapter, refuse_file, refuse_folder
from embedgrad.model.files.safetensors import SafetensorsFiles
from embedgrad.model.tokenizer import Tokenizer
from embedgrad.util.errors import ModelError
from embedgrad.util.shown import short


class TensorSource(Protocol):
    """A reader of a checkpoint's tensors. Tensors have their names in Hugging Face checkpoints."""

    def names(self) -> list[str]:
        """Names of all tensors in the file's order."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name. Reads no tensor."""
        ...

    def get(self, name: str) -> torch.Tensor:
        """The tensor on the CPU in a float type: a view into the mapped file, or a new float32 tensor if quantised."""
        ...

    def first_row(self, name: str) -> torch.Tensor:
        """The first row of a matrix, or a whole vector: [n] in a float type. Reads no more of a matrix."""
        ...

    def stored_as(self, name: str) -> str | None:
        """The name of the stored type in GGUF files, else None."""
        ...

    def raw(self, name: str) -> tuple[str, torch.Tensor] | None:
        """(name of the stored type, blocks as uint8 [matrix rows, bytes per matrix row]) in GGUF files, else None."""
        ...

    def release(self, name: str) -> None:
        """Gives back the memory that a quantised tensor takes as part of a mapped file. It may be read again."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. name: hub id, folder name or file name; it is shown to people and stored with prompts."""

    config: ModelConfig
    tokenizer: Tokenizer
    name: str
    tensors: TensorSource


def read_checkpoint(path: str | os.PathLike[str], *, long_context: bool = False) -> Checkpoint:
    """Opens a Hugging Face folder, a .gguf file, or a folder that holds one .gguf file.

    Reads headers, configuration and tokenizer. `Checkpoint.tensors` reads the tensors later. long_context: see
    `load_model`. Raises ModelError.
    """
    found = _read(Path(path))
    return replace(found, config=found.config.with_long_context(os.fspath(path))) if long_context else found


def _read(path: Path) -> Checkpoint:
    try:
        if not path.exists():
            raise ModelError(f"{path} does not exist; give a model folder, a .gguf file or a hub id.")
        if path.is_file():
            refuse_file(path)
            return _read_gguf(path)
        files = sorted(path.glob("*.gguf"))
        if (path / "config.json").is_file() and (not files or any(path.glob("*.safetensors"))):
            return _read_folder(path)
        if not files:
            refuse_folder(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(files) > 1:
        raise ModelError(f"{path} holds {len(files)} .gguf files; give the path of one of them.")
    refuse_file(files[0])
    return _read_gguf(files[0])


def _read_folder(folder: Path) -> Checkpoint:
    refuse_adapter(folder)
    where = folder / "config.json"
    fields = read_object(where)
    config = ModelConfig.from_hf(fields, str(where))
    tensors = SafetensorsFiles(folder, text_only=is_composite(fields))
    _check_tensors(tensors, config, str(folder))
    tokenizer = Tokenizer.from_folder(folder)
    _check_vocabulary(tokenizer, config, str(folder))
    return Checkpoint(config, tokenizer, name_of(folder), tensors)


def _read_gguf(path: Path) -> Checkpoint:
    tensors = GgufFile(path)
    config = ModelConfig.from_gguf(tensors.metadata, str(path), tensors.shapes(), tensors.rope_divisors())
    tensors.set_heads(config.num_heads, config.num_kv_heads)
    _check_tensors(tensors, config, str(path))
    tokenizer = Tokenizer.from_gguf(tensors.metadata, str(path))
    _check_vocabulary(tokenizer, config, str(path))
    return Checkpoint(config, tokenizer, path.stem, tensors)


def _check_tensors(tensors: TensorSource, config: ModelConfig, where: str) -> None:
    found, expected = tensors.shapes(), config.shapes()
    missing = [name for name in expected if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise ModelError(f"{where} lacks {missing[0]}{more}, which its configuration calls for.")
    for name, shape in expected.items():
        if found[name] != shape:
            told = short(list(found[name]))
            raise ModelError(f"{where}: {name} has shape {told}; its configuration says {list(shape)}.")
    extra = [name for name in found if name not in expected]
    if config.tied and extra == ["lm_head.weight"] and _is_tied(tensors):
        extra = []
    if extra == ["lm_head.weight"]:
        raise ModelError(
            f'{where}: "tie_word_embeddings" is true, but lm_head.weight differs from the embedding; set it to false '
            f"to use lm_head.weight."
        )
    if extra:
        more = f" and {len(extra) - 1} more tensors" if len(extra) > 1 else ""
        raise ModelError(f"{where} holds {extra[0]}{more}, for which its configuration has no place.")


def _is_tied(tensors: TensorSource) -> bool:
    return torch.equal(tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight"))


def _check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, where: str) -> None:
    """Raises ModelError where ordinary words have no row.

    Many fine-tunes add a padding token without a row, which harms nobody; a text that holds it is refused when it is
    rendered.
    """
    if tokenizer.words > config.vocab_size:
        raise ModelError(
            f"{where}: the tokenizer makes ids up to {tokenizer.words - 1}, but the embedding has "
            f"{config.vocab_size} rows; they do not belong together."
        )
    if tokenizer.eos_ids and tokenizer.eos_ids[-1] >= config.vocab_size:
        raise ModelError(
            f"{where}: the token that ends an answer has the id {tokenizer.eos_ids[-1]}, but the embedding has "
            f"{config.vocab_size} rows; correct eos_token_id."
        )
