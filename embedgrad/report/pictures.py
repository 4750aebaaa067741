"""Draws `curves` with matplotlib as SVG files for the Markdown report."""

from __future__ import annotations

import io
from typing import Any

from embedgrad.report.curves import COLOURS, HeatMap, Panel

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",  # the reader's fonts may lack the characters of a token
    "svg.hashsalt": "embedgrad",  # gives the same bytes for the same run
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.facecolor": "white",  # for readers with a dark theme
}


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def curve_picture(panel: Panel) -> bytes:
    """The bytes of an SVG file of curves."""
    with _figure(7.2, 3.2) as (figure, axes):
        for line in panel.lines:
            axes.plot(
                line.steps, line.values, label=line.name, color=COLOURS[line.colour % len(COLOURS)],
                linestyle="--" if line.dashed else "-", linewidth=1.0 if line.faint else 1.6,
                marker="o" if line.points else None, markersize=4,
            )  # fmt: skip
            if line.error is not None:
                axes.vlines(line.steps, *line.error, color=COLOURS[line.colour % len(COLOURS)], linewidth=0.8)
        if panel.band is not None:
            one, other = (panel.lines[index] for index in panel.band)
            if one.steps == other.steps:
                axes.fill_between(one.steps, one.values, other.values, color=COLOURS[0], alpha=0.15)
        for level in panel.levels:
            axes.axhline(level.value, color=COLOURS[5], linestyle=":", linewidth=1.2)
            axes.annotate(level.name, (0.005, level.value), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
        for mark in panel.marks:
            axes.axvline(mark.step, color="#d04545", linestyle="--", linewidth=0.8)
            if mark.value is not None:
                axes.plot([mark.step], [mark.value], "x", color="#d04545")
        if panel.percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.set_xlabel(panel.across)
        axes.set_ylabel(panel.axis)
        axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
        return _svg(figure)


def heat_picture(heat: HeatMap) -> bytes:
    """The bytes of an SVG file of a heat map. Its rows are numbered, because no font has all tokens' characters."""
    with _figure(7.2, min(10.0, max(2.4, 0.16 * len(heat.rows) + 1))) as (figure, axes):
        image = axes.imshow(
            heat.values, aspect="auto", cmap="viridis", vmin=min(0.99, *map(min, heat.values)), vmax=1.0,
            interpolation="nearest", extent=(0.5, len(heat.steps) + 0.5, len(heat.rows) - 0.5, -0.5),
        )  # fmt: skip
        places = sorted({1 + (i * (len(heat.steps) - 1)) // 5 for i in range(6)})
        axes.set_xticks(places, [str(heat.steps[place - 1]) for place in places])
        axes.grid(visible=False)
        axes.set_xlabel("step")
        axes.set_ylabel("row of the prompt")
        figure.colorbar(image, label="cosine")
        return _svg(figure)


class _figure:
    """A context manager that gives a matplotlib figure and its axes in this module's style. It needs no display."""

    def __init__(self, width: float, height: float) -> None:
        self._size = (width, height)

    def __enter__(self) -> tuple[Any, Any]:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self._context = matplotlib.rc_context(_STYLE)
        self._context.__enter__()
        figure = Figure(self._size, layout="constrained")
        FigureCanvasSVG(figure)
        return figure, figure.add_subplot()

    def __exit__(self, *raised: Any) -> None:
        self._context.__exit__(*raised)


def _svg(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
