"""Writes a report as Markdown. Texts of the run are escaped, so that no character in them is markup."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from embedgrad.report.content import Content, Examples, Section
from embedgrad.report.curves import HeatMap, Panel
from embedgrad.report.table import Table
from embedgrad.util.shown import isolated

_SIGNS = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")  # among them <> for HTML, $ for mathematics, & for entities
_FIRST = re.compile(r"^(\s*\d*)([-+=.)])(?!\d)", re.MULTILINE)  # list items and underlined headings


def render(content: Content, pictures: Mapping[str, str], version: str) -> str:
    """The report as Markdown. pictures: file name in the report's folder by key ("run1-loss", "all-loss")."""
    lines = [f"# {plain(content.title)}", ""]
    if content.comparison is not None:
        lines += ["## Comparison", "", *_table(content.comparison)]
        for panel in content.overlays:
            lines += _picture(f"all-{panel.key}", panel, pictures)
    for number, section in enumerate(content.sections, 1):
        if content.comparison is not None:
            lines += [f"## {plain(section.title)}", ""]
        lines += _section(section, f"run{number}", pictures)
    lines += [
        "---",
        "",
        f"Made by embedgrad {plain(version)} (`embedgrad report`) from the files of the run alone.",
        "",
    ]
    return "\n".join(lines)


def plain(text: str) -> str:
    """`text` as one line with all markup escaped."""
    escaped = _FIRST.sub(r"\1\\\2", _SIGNS.sub(r"\\\1", isolated(text)))
    return re.sub(r"\s*[\r\n\u2028\u2029\x0b\x0c\x85]+\s*", " ↵ ", escaped.strip())


def fenced(text: str, language: str = "") -> list[str]:
    """`text` unchanged in a code block, whose fence is longer than any fence in the text."""
    longest = max((len(found) for found in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text.rstrip("\n"), fence, ""]


def _section(section: Section, run: str, pictures: Mapping[str, str]) -> Iterator[str]:
    yield from (f"**{plain(section.verdict)}**", "")
    if section.missing:
        yield from ("What is missing:", "", *(f"- {plain(sentence)}" for sentence in section.missing), "")
    yield from _table(section.facts)
    for heading, table in section.tables.items():
        yield from (f"### {heading}", "", *_table(table))
    yield from (plain(section.leakage), "", "### Alarms", "")
    yield from ([f"- {plain(sentence)}" for sentence in section.alarms] or ["None went off."])
    yield ""
    for panel in section.panels:
        yield from _picture(f"{run}-{panel.key}", panel, pictures)
    if section.heat is not None:
        yield from _picture(f"{run}-{section.heat.key}", section.heat, pictures)
    if section.prompt:
        yield from ("### The prompt at the start", "", *fenced(section.prompt, "text"))
    if section.tokens is not None:
        yield from ("### Its tokens, before and after", "", *_table(section.tokens))
    if section.examples:
        yield from ("### Test examples that changed", "")
        for kind in section.examples:
            yield from _examples(kind)
    if section.config:
        yield from ("### Configuration", "", *fenced(section.config, "yaml"))
    if section.versions is not None:
        yield from ("### Versions and machine", "", *_table(section.versions))


def _table(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(map(plain, table.header))} |"
    figures = set(range(len(table.header))) - set(table.texts) if any(table.header) else ()
    yield f"| {' | '.join('---:' if i in figures else '---' for i in range(len(table.header)))} |"
    for row in table.rows:
        yield f"| {' | '.join(map(plain, row))} |"
    yield ""
    if table.note:
        yield from (plain(table.note), "")


def _picture(key: str, one: Panel | HeatMap, pictures: Mapping[str, str]) -> Iterator[str]:
    if key in pictures:
        yield from (f"### {one.title}", "", f"![{one.title}](<{pictures[key]}>)", "")
        if one.note:
            yield from (plain(one.note), "")


def _examples(kind: Examples) -> Iterator[str]:
    some = f", the first {len(kind.shown)} of them" if len(kind.shown) < kind.total else ""
    yield from (f"#### {kind.title}: {kind.total}{some}", "")
    for one in kind.shown:
        yield from (
            f"- {plain(one.query)}",
            f"  - expected: {plain(one.target)}",
            f"  - before: {plain(one.before)}",
            f"  - after: {plain(one.after)}",
        )
    yield ""
