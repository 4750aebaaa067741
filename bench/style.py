"""How pictures look: one style, deterministic files, a colour for each contender that stays the same everywhere."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedgrad.files import write_atomic

# Okabe and Ito's palette, which colour-blind readers tell apart.
OURS, OURS_TOO, OURS_THREE = "#0072B2", "#56B4E9", "#009E73"
OTHER, OTHER_TOO, OTHER_THREE, LIMIT = "#D55E00", "#E69F00", "#CC79A7", "#555555"
COLOURS = {
    "embedgrad": OURS, "embedgrad-layer": OURS_TOO, "embedgrad-stored": OURS_THREE,
    "embedgrad stored": OURS, "embedgrad float32": OURS_TOO, "native": OURS,
    "peft": OTHER, "transformers": OTHER_TOO, "transformers-compiled": OTHER_THREE, "llama.cpp": OTHER,
    "reference": OURS_TOO, "torch": OTHER,
}  # fmt: skip


@contextmanager
def used() -> Iterator[None]:
    """Figures made inside have the style."""
    import matplotlib as mpl

    mpl.use("svg")
    with mpl.rc_context({
        "svg.hashsalt": "embedgrad", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "figure.constrained_layout.use": True,
        "legend.frameon": False, "savefig.facecolor": "white",
    }):  # fmt: skip
        yield


def save(figure: Any, path: Path) -> None:
    """Write a figure as SVG; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_atomic(path, buffer.getvalue())


def colour(contender: str) -> str:
    """The contender's colour; llama.cpp's is the same for every number of slots."""
    return COLOURS.get(contender) or COLOURS.get(contender.split()[0], LIMIT)
