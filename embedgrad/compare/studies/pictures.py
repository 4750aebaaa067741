"""The common style of matplotlib pictures, and deterministic SVG files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedgrad.util.errors import ConfigError
from embedgrad.util.files import write_atomic

# The palette of Okabe and Ito, whose colours colour-blind readers can distinguish.
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
VERMILION, ORANGE, PURPLE, GREY = "#D55E00", "#E69F00", "#CC79A7", "#555555"


@contextmanager
def style() -> Iterator[None]:
    """Figures made inside the block have the style. Raises ConfigError where matplotlib is not installed."""
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
    """Puts the ticks of the x axes at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    for each in axes:
        each.xaxis.set_major_locator(MaxNLocator(integer=True))


def save(figure: Any, path: Path) -> None:
    """Writes a figure as SVG and closes it. The same figure gives the same bytes. Raises SaveError."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    write_atomic(path, buffer.getvalue())
