"""The documents: links lead somewhere, and examples are what the program takes."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml

from bench.__main__ import names, question
from embedgrad.cli.app import app
from embedgrad.train.settings import run_config
from tests.rooms import ROOT, modules, rooms

DOCUMENTS = sorted(path for place in ("*.md", "docs/**/*.md", "csrc/*.md", "bench/*.md") for path in ROOT.glob(place))
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(text_of(path)) if found == language]


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text_of(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def options_of(name: str) -> set[str]:
    """The options of `python -m bench NAME`."""
    parser = argparse.ArgumentParser()
    question(name).add_arguments(parser)
    return {*parser._option_string_actions, "--quick", "--unrecorded", "--json"}


@each_document
def test_links_lead_to_a_file_and_a_heading(path: Path) -> None:
    for target, anchor in LINK.findall(BLOCK.sub("", text_of(path))):
        if not target.startswith(("http:", "https:")):
            found = (path.parent / target).resolve() if target else path
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


@each_document
def test_python_and_configurations_can_be_read(path: Path) -> None:
    for block in blocks(path, "python"):
        ast.parse(block)
    for block in blocks(path, "yaml"):
        values = yaml.safe_load(block)
        run_config({"model": "m", "prompt": "p", "data": {"task": "imdb"}} | values, "the example")


@each_document
def test_commands_and_their_options_exist(path: Path) -> None:
    group = typer.main.get_command(app)
    for line in [line for block in blocks(path, "") for line in block.splitlines()]:
        words = shlex.split(line, comments=True) if line.startswith(("embedgrad ", "python -m bench ")) else []
        if words[:1] == ["embedgrad"] and words[1] not in ("--help", "lm-eval"):
            command = group.commands[words[1]]
            options = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
            assert {word.partition("=")[0] for word in words[2:] if word.startswith("-")} <= options, line
    for name, rest in re.findall(r"python -m bench (\w+)([^`\n#]*)", text_of(path)):
        assert name in (*names(), "all", "report", "tune", "NAME"), name
        if name in names():
            assert set(re.findall(r"--[\w-]+", rest)) <= options_of(name), f"{name}{rest}"


def test_the_readme_names_every_room() -> None:
    section = text_of(ROOT / "README.md").partition("\n## The rooms\n\n")[2].partition("`kernels/`")[0]
    assert set(re.findall(r"`(\w+)`", section)) == {room for room in rooms(modules()) if room != "kernels/"}


def test_the_table_of_csrc_names_every_file() -> None:
    rows = re.findall(r"^\| (.*?) \|", text_of(ROOT / "csrc" / "README.md"), re.MULTILINE)
    patterns = {name for row in rows for name in re.findall(r"`([\w.*/]+)`", row)}
    for path in (ROOT / "csrc").rglob("*.*"):
        name = path.name
        shown = {name, f"{path.stem}.*", "emulation/" if path.parent.name == "emulation" else name, path.suffix}
        assert path.suffix == ".md" or shown & patterns, path
    for folder in ("cpu", "decode", "cuda", "common"):
        assert f"**`{folder}/`**" in text_of(ROOT / "csrc" / "README.md")
