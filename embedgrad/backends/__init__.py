"""Backends: modules with the same functions and signatures; the decoder is handed one of them."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from embedgrad.errors import BackendError

NAMES = ("reference",)


def choose(name: str, device: torch.device) -> ModuleType:
    """The backend called `name`; "auto" is the best one for `device`.

    Raises BackendError: an unknown name, or a backend that cannot run here.
    """
    if name == "auto":
        name = "reference"
    if name not in NAMES:
        raise BackendError(f"unknown backend {name!r}; choose one of auto, {', '.join(NAMES)}.")
    return importlib.import_module(f"embedgrad.backends.{name}")
