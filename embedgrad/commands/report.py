"""`embedgrad report`: what runs came to, as an HTML page and its Markdown twin."""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from embedgrad.errors import ConfigError
from embedgrad.files import check_target, write_atomic
from embedgrad.report import content, markdown, page, pictures
from embedgrad.report.figures import plotly_script
from embedgrad.report.read import read_run


def run(folders: Sequence[Path], output: Path | None, examples: int) -> None:
    """The command. Raises ConfigError (no run, no plotly, an output that is no .html file), SaveError."""
    if output is None:
        if len(folders) > 1:
            raise ConfigError("several runs make one report: say where with --output FILE.html.")
        output = folders[0] / "report.html"
    elif output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(
            f"--output is {output}, but should be the name of an .html file; its .md twin goes beside it."
        )
    check_target(output)
    plotly_script()  # a missing library is refused before anything is read
    built = content.build([read_run(folder) for folder in folders], examples)
    write_atomic(output, page.render(built, _version()).encode("utf-8", "replace"))
    drawn = _draw(built, output) if pictures.available() else {}
    twin = output.with_suffix(".md")
    write_atomic(twin, markdown.render(built, drawn, _version()).encode("utf-8", "replace"))
    print(f"Written: {output} and {twin}")


def _draw(built: content.Content, output: Path) -> dict[str, str]:
    """Write the Markdown's pictures beside it; keys to the files' names as a link spells them."""
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
    from embedgrad.environment import versions

    return versions()["embedgrad"] or "(version unknown)"
