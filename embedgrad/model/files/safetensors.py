"""Reads the tensors of one or more *.safetensors files by memory mapping."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from embedgrad.model.files.recognise import stand_in
from embedgrad.util.errors import ModelError
from embedgrad.util.shown import first_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# model.safetensors of one type beside those of others: model.fp16.safetensors, model.fp16-00001-of-00002.safetensors or
# model-00001-of-00002.fp16.safetensors.
_VARIANT = re.compile(r"model(?:\.(\w+))?(?:-\d{5}-of-\d{5})?(?:\.(\w+))?\.safetensors")
# Old versions of transformers stored these frequencies. They follow from the configuration and are ignored.
DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class ModelFilesWarning(UserWarning):
    """A model's folder holds more than one set of weights; the message says which one is read."""


# Names of a multimodal model's text tensors, as transformers 4 and 5 spell them, and what the text model calls them.
_OF_TEXT = (
    (re.compile(r"language_model\.(model|lm_head)\."), r"\1."),
    (re.compile(r"model\.language_model\."), "model."),
    (re.compile(r"lm_head\."), "lm_head."),
)


class SafetensorsFiles:
    """The TensorSource of a folder of safetensors files. Tensors are views into private mappings of the files.

    text_only: of a multimodal model only the tensors of the text part are there, by the text model's names.
    """

    def __init__(self, folder: Path, *, text_only: bool = False) -> None:
        """Opens the files and checks all headers. Raises ModelError."""
        self._text_only = text_only
        self._stored_names: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        paths, listed = files_of(folder)
        for path in paths:
            self._add(path)
        own = ((name, self._name(name)) for name in listed if not DERIVED.fullmatch(name))
        absent = [stored for stored, name in own if name is not None and name not in self._files]
        if absent:
            raise ModelError(
                f"{folder / INDEX} lists {absent[0]} and {len(absent) - 1} more tensors that the files do not hold; "
                f"the download is probably incomplete."
            )

    def names(self) -> list[str]:
        return list(self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def get(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(self._stored_names[name])

    def first_row(self, name: str) -> torch.Tensor:
        if len(self._shapes[name]) < 2:
            return self.get(name)
        row: torch.Tensor = self._files[name].get_slice(self._stored_names[name])[0:1]
        return row.flatten()

    def stored_as(self, name: str) -> str | None:
        return None

    def raw(self, name: str) -> tuple[str, torch.Tensor] | None:
        return None

    def release(self, name: str) -> None:
        """Nothing: no tensor of these files is quantised."""

    def _name(self, stored: str) -> str | None:
        return text_name(stored) if self._text_only else stored

    def _add(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt", device="cpu")
            for stored in file.keys():  # noqa: SIM118 (no mapping)
                name = self._name(stored)
                if name is None or DERIVED.fullmatch(stored):
                    continue
                header = file.get_slice(stored)
                if header.get_dtype() not in DTYPES:
                    raise ModelError(
                        f"{path}: {name} has type {header.get_dtype()}; supported are {', '.join(DTYPES)} (a quantised "
                        f"model is read from GGUF)."
                    )
                if name in self._files:
                    raise ModelError(f"{path}: {name} is in another file of the folder as well.")
                self._files[name], self._stored_names[name] = file, stored
                self._shapes[name] = tuple(header.get_shape())
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            found = stand_in(path) or f"is not a complete safetensors file ({first_line(error)}); fetch it again"
            raise ModelError(f"{path} {found}.") from error


def text_name(stored: str) -> str | None:
    """What the text model calls a tensor of a multimodal model; None for one of another part."""
    found = ((pattern.match(stored), pattern, name) for pattern, name in _OF_TEXT)
    return next((pattern.sub(name, stored, count=1) for match, pattern, name in found if match), None)


def files_of(folder: Path) -> tuple[list[Path], Iterable[str]]:
    """(files to open, names of the tensors that an index lists). Raises ModelError.

    A single file comes before an index, as in transformers, which leaves the index of an earlier save behind. Of
    a model that was saved in several types the unmarked set is read, else the largest.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        if index.is_file():
            warnings.warn(f"{folder} holds {SINGLE} and {INDEX}; the former is read.", ModelFilesWarning, stacklevel=2)
        return [single], ()
    if index.is_file():
        return _listed(folder, index)
    others = sorted(folder.glob("*.safetensors"))
    if not others:
        hint = "; pickled *.bin weights are not read, convert them" if any(folder.glob("*.bin")) else ""
        raise ModelError(f"{folder} holds no *.safetensors file{hint}.")
    variants: dict[str, list[Path]] = {}
    for path in others:
        if (found := _VARIANT.fullmatch(path.name)) is not None:
            variants.setdefault(found[1] or found[2] or "", []).append(path)
    if not variants:
        return others, ()
    sets = {
        name: [p for p in paths if p.name == f"model.{name}.safetensors"] or paths for name, paths in variants.items()
    }
    chosen = max(sets, key=lambda name: (name == "", sum(path.stat().st_size for path in sets[name])))
    index = folder / f"{INDEX.removesuffix('.json')}.{chosen}.json"
    sharded = bool(chosen) and not (folder / f"model.{chosen}.safetensors").is_file() and index.is_file()
    return _listed(folder, index) if sharded else (sets[chosen], ())


def _listed(folder: Path, index: Path) -> tuple[list[Path], Iterable[str]]:
    """`files_of` by an index."""
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weights.values()))
        plain = bool(names) and all(isinstance(name, str) and Path(name).name == name for name in names)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        found = stand_in(index) or 'is not a JSON object with a "weight_map"; fetch it again'
        raise ModelError(f"{index} {found}.") from error
    if not plain:
        raise ModelError(f"{index} should name files of its own folder in weight_map.")
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"{folder} lacks {name}, which {index.name} names; fetch it as well.")
    return [folder / name for name in names], weights
