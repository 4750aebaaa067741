"""Draws `curves` as plotly figures for the HTML page. The page sets the colours of the theme."""

from __future__ import annotations

import html
import json
from typing import Any

from embedgrad.report.curves import COLOURS, HeatMap, Line, Panel
from embedgrad.util.errors import ConfigError

_ROW, _LEAST = 17, 220  # pixels: height of a row in a heat map, and least height of a heat map
_TALLEST = 900  # pixels: greatest height of a heat map
_LABEL = 14  # characters in the label of a row
ALARM = "#d04545"
FILL = "rgba(217, 130, 43, 0.18)"


def plotly_script() -> str:
    """The source of plotly.js. Raises ConfigError where plotly is not installed."""
    _need()
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def curve_figure(panel: Panel) -> dict[str, Any]:
    """{"data": traces, "layout": layout} as JSON-able values. Raises ConfigError where plotly is not installed."""
    go = _need()
    figure = go.Figure()
    for index, line in enumerate(panel.lines):
        filled = panel.band is not None and index == panel.band[1]
        figure.add_trace(_trace(go, line, panel.percent, "tonexty" if filled else "none"))
    for level in panel.levels:
        figure.add_hline(
            y=level.value, line={"dash": "dot", "width": 1.5, "color": COLOURS[5]},
            annotation={
                "text": _plain(level.name), "font": {"size": 11}, "xanchor": "left", "x": 0, "yanchor": "bottom",
            },
        )  # fmt: skip
    if panel.marks:
        figure.add_trace(_alarms(go, panel))
    for mark in panel.marks:
        figure.add_vline(x=mark.step, line={"dash": "dash", "width": 1, "color": ALARM})
    last = max(1, *(step for line in panel.lines for step in line.steps))
    figure.update_layout(
        template=None, height=340, hovermode="x unified", hoverlabel={"namelength": -1},
        margin={"l": 58, "r": 12, "t": 12, "b": 44},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        xaxis={"title": {"text": panel.across}, "zeroline": False, "range": [0, 1.02 * last]},
        yaxis={
            "title": {"text": panel.axis, "standoff": 10}, "automargin": True, "zeroline": False,
            **({"tickformat": ".0%"} if panel.percent else {}),
        },
    )  # fmt: skip
    return _values(figure)


def heat_figure(heat: HeatMap) -> dict[str, Any]:
    """The same for a heat map."""
    go = _need()
    lowest = min(min(row) for row in heat.values)
    figure = go.Figure(
        go.Heatmap(
            x=heat.steps,
            y=list(range(len(heat.rows))),
            z=[[round(v, 4) for v in row] for row in heat.values],
            text=[[_plain(row)] * len(heat.steps) for row in heat.rows],
            colorscale="Viridis",
            zmin=min(lowest, 0.99),
            zmax=1.0,
            hovertemplate="step %{x}<br>%{text}<br>similarity %{z:.4f}<extra></extra>",
            colorbar={"thickness": 12, "title": {"text": "cosine", "side": "right"}, "outlinewidth": 0},
        )
    )
    every = 1 + len(heat.rows) // ((_TALLEST - 60) // _ROW)
    shown = range(0, len(heat.rows), every)
    figure.update_layout(
        template=None, height=min(_TALLEST, max(_LEAST, 60 + _ROW * len(heat.rows))),
        margin={"l": 58, "r": 12, "t": 12, "b": 44},
        xaxis={"title": {"text": "step"}, "zeroline": False, "showgrid": False},
        yaxis={
            "autorange": "reversed", "automargin": True, "showgrid": False, "zeroline": False,
            "tickvals": list(shown), "ticktext": [_plain(_cut(heat.rows[row])) for row in shown],
            "tickfont": {"size": 11},
        },
    )  # fmt: skip
    return _values(figure)


def _need() -> Any:
    try:
        import plotly.graph_objects
    except ImportError:
        raise ConfigError("a report's pictures need plotly: pip install 'embedgrad[report]'.") from None
    return plotly.graph_objects


def _trace(go: Any, line: Line, percent: bool, fill: str) -> Any:
    form = "%{y:.1%}" if percent else "%{y:.4f}"
    error = None
    if line.error is not None:
        low, high = line.error
        error = {
            "type": "data", "symmetric": False, "thickness": 1, "width": 3,
            "array": [top - value for top, value in zip(high, line.values, strict=True)],
            "arrayminus": [value - bottom for bottom, value in zip(low, line.values, strict=True)],
        }  # fmt: skip
    return go.Scatter(
        x=line.steps, y=line.values, name=_plain(line.name), mode="lines+markers" if line.points else "lines",
        line={
            "color": COLOURS[line.colour % len(COLOURS)], "width": 1.3 if line.faint else 2,
            "dash": "dash" if line.dashed else "solid",
        },
        marker={"size": 6}, error_y=error, fill=fill, fillcolor=FILL, cliponaxis=not line.points, hovertemplate=form,
    )  # fmt: skip


def _alarms(go: Any, panel: Panel) -> Any:
    """The alarms' marks: a cross at the alarm's value, or a triangle at the bottom for an alarm without value."""
    lowest = min(value for line in panel.lines for value in line.values)
    return go.Scatter(
        x=[mark.step for mark in panel.marks], name="alarm", mode="markers",
        y=[lowest if mark.value is None else mark.value for mark in panel.marks],
        text=[_plain(mark.text) for mark in panel.marks], hovertemplate="%{text}<extra></extra>",
        marker={
            "color": ALARM, "size": 11,
            "symbol": ["triangle-up" if mark.value is None else "x" for mark in panel.marks],
        },
    )  # fmt: skip


def _cut(text: str) -> str:
    return text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"


def _plain(text: str) -> str:
    """`text` with HTML tags and entities escaped, which plotly would interpret."""
    return html.escape(text, quote=False)


def _values(figure: Any) -> dict[str, Any]:
    values = json.loads(figure.to_json())
    return {"data": values["data"], "layout": values["layout"]}
