"""A task made of the user's own JSON-lines files: one file that is split, or one file for each part."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from embedgrad.data.example import Example
from embedgrad.data.readers import read_jsonl
from embedgrad.tasks.source import Source
from embedgrad.tasks.task import Pools, Task


@dataclass(frozen=True)
class File:
    """A data file. limit: use only the first `limit` examples; None: all."""

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
    """The task made of these files.

    query, target: names of the fields. labels: all possible answers, or None. divided: `train` is split into all parts,
    and the other files are ignored. Otherwise the user has split the data: no example is removed, but the leakage check
    reports texts that occur in two parts.
    """

    def load(source: Source, variant: str | None = None) -> Pools:
        def part(file: File | None) -> list[Example]:
            return [] if file is None else read_jsonl(file.path, query, target, file.limit)

        if divided:
            return Pools(train=part(train))
        return Pools(train=part(train), validation=part(validation), test=part(test))

    return Task(name="jsonl", load=load, prompt="", labels=None if labels is None else tuple(labels))
