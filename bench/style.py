"""A colour for each contender that stays the same in every picture; the rest of the style is the program's own."""

from __future__ import annotations

from embedgrad.pictures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, save
from embedgrad.pictures import style as used

__all__ = ["LIMIT", "OTHER", "OTHER_THREE", "OTHER_TOO", "OURS", "OURS_THREE", "OURS_TOO", "colour", "save", "used"]

OURS, OURS_TOO, OURS_THREE = BLUE, SKY, GREEN
OTHER, OTHER_TOO, OTHER_THREE, LIMIT = VERMILION, ORANGE, PURPLE, GREY
COLOURS = {
    "embedgrad": OURS, "embedgrad-layer": OURS_TOO, "embedgrad-stored": OURS_THREE,
    "embedgrad stored": OURS, "embedgrad float32": OURS_TOO, "native": OURS,
    "peft": OTHER, "transformers": OTHER_TOO, "transformers-compiled": OTHER_THREE, "llama.cpp": OTHER,
    "reference": OURS_TOO, "torch": OTHER,
}  # fmt: skip


def colour(contender: str) -> str:
    """The contender's colour; llama.cpp's is the same for every number of slots."""
    return COLOURS.get(contender) or COLOURS.get(contender.split()[0], LIMIT)
