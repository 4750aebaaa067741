"""Reads the tensors of one or more *.safetensors files by memory mapping."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from embedgrad.util.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# Old versions of transformers stored these frequencies. They follow from the configuration and are ignored.
DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class SafetensorsFiles:
    """The TensorSource of a folder of safetensors files. Tensors are views into private mappings of the files."""

    def __init__(self, folder: Path) -> None:
        """Opens the files and checks all headers. Raises ModelError."""
        self._files: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        paths, listed = files_of(folder)
        for path in paths:
            self._add(path)
        absent = [name for name in listed if name not in self._files and not DERIVED.fullmatch(name)]
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
        return self._files[name].get_tensor(name)

    def raw(self, name: str) -> tuple[str, torch.Tensor] | None:
        return None

    def _add(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt", device="cpu")
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if DERIVED.fullmatch(name):
                    continue
                header = file.get_slice(name)
                if header.get_dtype() not in DTYPES:
                    raise ModelError(
                        f"{path}: {name} has type {header.get_dtype()}; supported are {', '.join(DTYPES)} (quantised "
                        f"models are read from GGUF)."
                    )
                if name in self._files:
                    raise ModelError(f"{path}: {name} is in another file of the folder as well.")
                self._files[name] = file
                self._shapes[name] = tuple(header.get_shape())
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{path} is not a complete safetensors file ({_line(error)}); fetch it again.") from error


def files_of(folder: Path) -> tuple[list[Path], Iterable[str]]:
    """(files to open, names of the tensors that an index lists). Raises ModelError."""
    index = folder / INDEX
    if index.is_file():
        try:
            weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weights.values()))
            plain = bool(names) and all(isinstance(name, str) and Path(name).name == name for name in names)
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f'{index} is not a JSON object with a "weight_map"; fetch it again.') from error
        if not plain:
            raise ModelError(f"{index} should name files of its own folder in weight_map.")
        for name in names:
            if not (folder / name).is_file():
                raise ModelError(f"{folder} lacks {name}, which {INDEX} names; fetch it as well.")
        return [folder / name for name in names], weights
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], ()
    others = sorted(folder.glob("*.safetensors"))
    if not others:
        hint = "; pickled *.bin weights are not read, convert them" if any(folder.glob("*.bin")) else ""
        raise ModelError(f"{folder} holds no *.safetensors file{hint}.")
    return others, ()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
