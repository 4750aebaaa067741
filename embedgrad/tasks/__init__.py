"""The tasks: data sets with their prompt, labels or grader, split and settings. `task.py` defines the interface."""

from __future__ import annotations

import difflib
import importlib

from embedgrad.tasks.task import Task
from embedgrad.util.errors import ConfigError

_HOMES = {  # `embedgrad.tasks.jsonl` makes a task of the user's own files
    "imdb": "embedgrad.tasks.imdb",
    "causal_judgement": "embedgrad.tasks.causal_judgement",
    "math500": "embedgrad.tasks.math500",
    "movie-snippets": "embedgrad.tasks.movie_snippets",
}
NAMES = tuple(_HOMES)


def find_task(name: str) -> Task:
    """The task with this name. Raises ConfigError where there is none."""
    if name not in _HOMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(NAMES)}."
        raise ConfigError(f"there is no task {name!r}; {hint}")
    task = importlib.import_module(_HOMES[name]).TASK
    assert isinstance(task, Task)
    return task
