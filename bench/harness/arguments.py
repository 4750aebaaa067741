"""Command-line options that questions share, and their values; where one is wrong, argparse ends with the sentence."""

from __future__ import annotations

import math
import os
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no whole number above 0.")
    return int(text)


def add_machine(parser: ArgumentParser, *, backend: bool = False, device: bool = True, of: str | None = None) -> None:
    """The options --threads, and as asked --backend and --device. of: whose device."""
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    if backend:
        parser.add_argument("--backend", default="auto", help="of embedgrad (default auto)")
    if device:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=of)


def minutes(text: str) -> float:
    """A finite number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and found > 0):
        raise ArgumentTypeError(f"{text!r} is no number of minutes above 0.")
    return found


def folder(text: str) -> Path:
    """A folder, or a place where one can be made."""
    path = Path(text)
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ArgumentTypeError(f"{text!r} cannot be a folder, since {str(nearest)!r} is a file.")
    if not os.access(nearest, os.W_OK):
        raise ArgumentTypeError(f"{text!r} cannot be a folder, since nothing may be written in {str(nearest)!r}.")
    return path
