"""How pictures look: a colour for each contender, the same in every picture, and bars.

The rest of the style is the program's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embedgrad.compare.studies.pictures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, save, style

__all__ = ["LIMIT", "OTHER", "OTHER_THREE", "OTHER_TOO", "OURS", "OURS_THREE", "OURS_TOO", "THREE", "colour",
           "grouped_bars", "save", "stacked_bars", "style"]  # fmt: skip

OURS, OURS_TOO, OURS_THREE = THREE = (BLUE, SKY, GREEN)
OTHER, OTHER_TOO, OTHER_THREE, LIMIT = VERMILION, ORANGE, PURPLE, GREY
COLOURS = {
    "embedgrad": OURS, "embedgrad-layer": OURS_TOO, "embedgrad-stored": OURS_THREE,
    "embedgrad stored": OURS, "embedgrad float32": OURS_TOO, "native": OURS,
    "peft": OTHER, "transformers": OTHER_TOO, "transformers-compiled": OTHER_THREE, "llama.cpp": OTHER,
    "reference": OURS_TOO, "torch": OTHER,
}  # fmt: skip

Series = Sequence[tuple[str, Any, Sequence[float | None]]]
"""(label, colour, values)."""


def colour(contender: str) -> str:
    """The contender's colour; llama.cpp's is the same for every number of slots."""
    return COLOURS.get(contender) or COLOURS.get(contender.split()[0], LIMIT)


def grouped_bars(axes: Any, series: Series, *, flat: bool = False, numbers: str = "", **options: Any) -> None:
    """Group i holds value i of each series, side by side; None is no bar.

    flat: horizontal bars. numbers: the format of the number at each bar. options: of a series' bars, one for each.
    """
    width = 0.8 / max(1, len(series))
    for place, (label, fill, values) in enumerate(series):
        there = [i for i, value in enumerate(values) if value is not None]
        at = [i + (place - (len(series) - 1) / 2) * width for i in there]
        own = {name: given[place] for name, given in options.items()}
        draw = axes.barh if flat else axes.bar
        bars = draw(at, [values[i] for i in there], width * 0.9, color=fill, label=label, **own)
        if numbers:
            axes.bar_label(bars, fmt=numbers, fontsize=7, padding=2 if flat else 1)
    axes.grid(axis="y" if flat else "x", visible=False)


def stacked_bars(axes: Any, at: Sequence[int], series: Series, **options: Any) -> None:
    """Horizontal bars at the heights `at`; the values of the series follow each other."""
    left = [0.0] * len(at)
    for label, fill, values in series:
        axes.barh(at, values, left=left, color=fill, label=label, **options)
        left = [a + (b or 0.0) for a, b in zip(left, values, strict=True)]
    axes.grid(axis="y", visible=False)
