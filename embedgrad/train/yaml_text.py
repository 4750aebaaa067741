"""Reads YAML in which nothing is lost: a key that stands twice in one mapping is refused."""

from __future__ import annotations

from typing import Any

import yaml

from embedgrad.util.bounded_yaml import BoundedLoader, TooLarge
from embedgrad.util.errors import ConfigError
from embedgrad.util.shown import short

_MERGE = "tag:yaml.org,2002:merge"


class _Twice(Exception):
    """A key that a mapping has twice; the message continues a sentence that begins with the text's name."""


class _Loader(BoundedLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                where = f"in line {line}" if lines[name] == line else f"in line {lines[name]} and in line {line}"
                raise _Twice(f"has the key {short(key.value)} twice, {where}; one of them would be lost")
            lines[name] = line
        return super().construct_mapping(node, deep)


def read_yaml(text: str, what: str) -> Any:
    """The value of the YAML `text`. `what` names the text in the message of a ConfigError."""
    try:
        return yaml.load(text, _Loader)
    except _Twice as twice:
        raise ConfigError(f"{what} {twice}.") from None
    except TooLarge as error:
        raise ConfigError(f"{what} {error}.") from None
    except RecursionError:
        raise ConfigError(f"{what} is not YAML that can be read: it is nested too deeply.") from None
    except Exception as error:  # PyYAML also lets errors of Python's conversions through, such as 2024-13-45 as a date
        raise ConfigError(f"{what} is not YAML: {_problem(error)}.") from error


def _problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else str(problem)
