"""Tasks: data sets as examples, each with its prompt, labels or grader, split and settings; see `task.py`."""

from __future__ import annotations

import difflib
import importlib

from embedgrad.errors import ConfigError
from embedgrad.tasks.task import Task

_HOMES = {  # the user's own files are a task as well: `embedgrad.tasks.jsonl`
    "imdb": "embedgrad.tasks.imdb",
    "causal_judgement": "embedgrad.tasks.causal_judgement",
    "math500": "embedgrad.tasks.math500",
    "movie-snippets": "embedgrad.tasks.movie_snippets",
}
NAMES = tuple(_HOMES)


def find_task(name: str) -> Task:
    """The task of this name. Raises ConfigError."""
    if name not in _HOMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(NAMES)}."
        raise ConfigError(f"there is no task {name!r}; {hint}")
    task = importlib.import_module(_HOMES[name]).TASK
    assert isinstance(task, Task)
    return task
