"""The common interface of all tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embedgrad.data.example import Example
from embedgrad.data.splitting import Group
from embedgrad.prompt.template import Template
from embedgrad.tasks.source import Source


@dataclass(frozen=True)
class Pools:
    """The examples in a task's files, before they are split.

    train: examples that the parts are drawn from. validation, test: separate sets, or None where the task has none.
    With a separate test set no test example is drawn from `train`, and training examples with the text of a test
    example are removed. dropped: number of data rows that cannot be used.
    """

    train: list[Example]
    validation: list[Example] | None = None
    test: list[Example] | None = None
    dropped: int = 0


@dataclass(frozen=True)
class Task:
    """A data set and everything that is needed to optimise and test a prompt on it.

    load: reads the pools, given a source and the name of a variant or None.
    variants: names of the variants of the data; the first is the default.
    grouping: makes, from all examples, the function that says which of them must stay in the same part of a split
        (`embedgrad.data.splitting.Group`); None: only examples with equal texts stay together.
    prompt: the starting prompt. paraphrases: other wordings of it, written by hand.
    template: where the prompt stands; None: the model's default (`embedgrad.prompt.prompt.default_template`).
    labels: all possible answers, or None.
    grader: a value for `embedgrad.evaluation.grading.registry.make_grader`.
    sizes: numbers of examples in train, validation and test; None: the pools are already the parts.
    query_tokens: queries are truncated to this many tokens; None: not at all.
    target_tokens: training examples with longer targets are dropped; None: none.
    max_new_tokens: longest answer; None: as long as the longest target needs.
    optimize: settings of `OptimizeConfig` that differ from its defaults.
    """

    name: str
    load: Callable[[Source, str | None], Pools]
    prompt: str
    paraphrases: tuple[str, ...] = ()
    template: Template | None = None
    labels: tuple[str, ...] | None = None
    grader: str | Mapping[str, Any] = "exact"
    grouping: Callable[[Sequence[Example]], Group] | None = None
    variants: tuple[str, ...] = ()
    sizes: Mapping[str, int] | None = None
    query_tokens: int | None = None
    target_tokens: int | None = None
    max_new_tokens: int | None = None
    optimize: Mapping[str, Any] = field(default_factory=dict)
