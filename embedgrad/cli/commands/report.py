"""`embedgrad report`: writes the results of runs as an HTML page and as Markdown."""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from embedgrad.report import content, markdown, page, pictures
from embedgrad.report.figures import plotly_script
from embedgrad.report.read import read_run
from embedgrad.util.errors import ConfigError
from embedgrad.util.files import check_target, write_atomic


def run(folders: Sequence[Path], output: Path | None, examples: int) -> None:
    """Runs the command. Raises ConfigError (no run, no plotly, an output that is not an .html file) and SaveError."""
    if output is None:
        if len(folders) > 1:
            raise ConfigError("several runs make one report: say where with --output FILE.html.")
        output = folders[0] / "report.html"
    elif output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(
            f"--output is {output}, but should be the name of an .html file; its .md twin goes beside it."
        )
    check_target(output)
    plotly_script()  # raises for a missing library before anything is read
    write_page(content.build([read_run(folder) for folder in folders], examples), output)
    print(f"Written: {output} and {output.with_suffix('.md')}")


def write_page(built: content.Content, output: Path) -> None:
    """Writes the page, and its Markdown twin with its pictures beside it. Raises ConfigError, SaveError."""
    write_atomic(output, page.render(built, _version()).encode("utf-8", "replace"))
    drawn = _draw(built, output) if pictures.available() else {}
    write_atomic(output.with_suffix(".md"), markdown.render(built, drawn, _version()).encode("utf-8", "replace"))


def _draw(built: content.Content, output: Path) -> dict[str, str]:
    """Writes the pictures of the Markdown report into its folder. Returns the files' names, URL-encoded, by key."""
    found = {f"all-{panel.key}": pictures.curve_picture(panel) for panel in built.overlays}
    for number, section in enumerate(built.sections, 1):
        found |= {f"run{number}-{panel.key}": pictures.curve_picture(panel) for panel in section.panels}
        if section.heat is not None:
            found[f"run{number}-{section.heat.key}"] = pictures.heat_picture(section.heat)
    names = {}
    for key, data in found.items():
        short = key if len(built.sections) > 1 else key.removeprefix("run1-")
        name = f"{output.stem}-{short}.svg"
        write_atomic(output.with_name(name), data)
        names[key] = urllib.parse.quote(name)
    return names


def _version() -> str:
    from embedgrad.util.environment import versions

    return versions()["embedgrad"] or "(version unknown)"
