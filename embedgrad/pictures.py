"""How pictures made with matplotlib look: one style, deterministic files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedgrad.errors import ConfigError
from embedgrad.files import write_atomic

# Okabe and Ito's palette, which colour-blind readers tell apart.
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
VERMILION, ORANGE, PURPLE, GREY = "#D55E00", "#E69F00", "#CC79A7", "#555555"


@contextmanager
def style() -> Iterator[None]:
    """Figures made inside have the style. Raises ConfigError where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install 'embedgrad[report]' brings it.") from None
    mpl.use("svg")
    with mpl.rc_context({
        "svg.hashsalt": "embedgrad", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "figure.constrained_layout.use": True,
        "legend.frameon": False, "savefig.facecolor": "white",
    }):  # fmt: skip
        yield


def whole_numbers(*axes: Any) -> None:
    """Ticks of the x axis, which counts something."""
    from matplotlib.ticker import MaxNLocator

    for each in axes:
        each.xaxis.set_major_locator(MaxNLocator(integer=True))


def save(figure: Any, path: Path) -> None:
    """Write a figure as SVG; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_atomic(path, buffer.getvalue())
