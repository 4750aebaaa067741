"""The user's own JSON-lines files as a task: one file that is divided, or one file for each part."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from embedgrad.data import read_jsonl
from embedgrad.example import Example
from embedgrad.tasks.source import Source
from embedgrad.tasks.task import Pools, Task


@dataclass(frozen=True)
class File:
    """path: of the file; limit: only the first so many examples."""

    path: str | os.PathLike[str]
    limit: int | None = None


def of_files(
    train: File,
    validation: File | None,
    test: File | None,
    query: str = "query",
    target: str = "target",
    labels: Sequence[str] | None = None,
    divided: bool = False,
) -> Task:
    """The task that these files are; `query` and `target` name their fields. divided: all parts come from `train`.

    The files of a task that is not divided are the user's own division: nothing is left out, but the leakage check
    says what is on two sides.
    """

    def load(source: Source, variant: str | None = None) -> Pools:
        def part(file: File | None) -> list[Example]:
            return [] if file is None else read_jsonl(file.path, query, target, file.limit)

        if divided:
            return Pools(train=part(train))
        return Pools(train=part(train), validation=part(validation), test=part(test))

    return Task(name="jsonl", load=load, prompt="", labels=None if labels is None else tuple(labels))
