"""What a task is: one interface over data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embedgrad.example import Example
from embedgrad.splitting import Group
from embedgrad.tasks.source import Source
from embedgrad.template import Template


@dataclass(frozen=True)
class Pools:
    """What a task's files hold, before any division.

    train: what the parts are drawn from. validation, test: sets of their own, where the task has them; then nothing of
    `train` comes to these parts, and of `train` whatever has the same text as one of them is left out. dropped: rows
    that cannot be used.
    """

    train: list[Example]
    validation: list[Example] | None = None
    test: list[Example] | None = None
    dropped: int = 0


@dataclass(frozen=True)
class Task:
    """A task.

    load: the pools, from a source and a variant's name; variants: those names, the default first. grouping: gives
    for all examples what says which of them must come to the same side of a split, where equal texts are not enough
    (`embedgrad.splitting`). paraphrases: other ways to say the prompt, written by hand. template: None is the
    model's default (`embedgrad.prompt.default_template`). labels: all answers there are. grader: as
    `embedgrad.grading.grader.make_grader` takes it. sizes: examples of train, validation and test; None for pools
    that are parts already. query_tokens: queries are cut after so many tokens. target_tokens: examples with longer
    targets are not trained on. max_new_tokens: of an answer; None: what the longest target needs. optimize:
    settings of `OptimizeConfig` that differ from its defaults.
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
