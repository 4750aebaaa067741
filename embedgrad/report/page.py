"""Writes a report as one self-contained HTML file.

The file contains styles, pictures and plotly.js. Its content security policy forbids loading anything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from embedgrad.report.content import Content
from embedgrad.report.figures import curve_figure, heat_figure, plotly_script
from embedgrad.util.shown import isolated

THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1c2126", "quiet": "#5c6670", "line": "#d8dde2", "soft": "#f4f6f8",
              "accent": "#1f6fb2", "bad": "#b3261e"},
    "dark": {"paper": "#14181c", "ink": "#e4e8ec", "quiet": "#9aa5b0", "line": "#333b43", "soft": "#1d2329",
             "accent": "#6db3ee", "bad": "#ff8a80"},
}  # fmt: skip


def render(content: Content, version: str) -> str:
    """The report as an HTML page. Raises ConfigError where plotly is not installed."""
    script = plotly_script()
    figures: dict[str, Any] = {}
    for panel in content.overlays:
        figures[f"all-{panel.key}"] = curve_figure(panel)
    for number, section in enumerate(content.sections, 1):
        for panel in section.panels:
            figures[f"run{number}-{panel.key}"] = curve_figure(panel)
        if section.heat is not None:
            figures[f"run{number}-{section.heat.key}"] = heat_figure(section.heat)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_isolated,
    )  # fmt: skip
    template = environment.get_template("page.html.jinja")
    return template.render(content=content, figures=figures, themes=THEMES, plotly=script, version=version)


def _isolated(value: Any) -> Any:
    """A value for the page: a text of the run in an isolate, so that it changes no direction of text around it."""
    return isolated(value) if type(value) is str else value  # not of Markup, which is the page's own
