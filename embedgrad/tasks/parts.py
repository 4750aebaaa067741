"""Makes training, validation and test data from a task's pools: truncates queries, draws parts, checks for leakage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from embedgrad.data.example import Example
from embedgrad.data.leakage import Leakage, check_leakage
from embedgrad.data.splitting import Group, folds, split, without
from embedgrad.tasks.task import Pools, Task
from embedgrad.util.errors import ConfigError, DataError

ATTEMPTS = 4  # a character has at most 4 bytes, and so at most 4 tokens
# Of a long text only the beginning is encoded: LONGEST characters for each token, which must give MARGIN more tokens
# than are needed.
LONGEST, MARGIN = 8, 16


class Encoder(Protocol):
    """The part of a tokenizer that truncation needs."""

    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


@dataclass(frozen=True)
class Division:
    """How the pools are split.

    sizes: numbers of examples in train, validation and test, or fractions of the pool that a part is drawn from; None,
    or None for a part: the task's number. seed: seed of the draw. folds: number of folds for cross-validation; None: no
    cross-validation. fold: index of the test fold, from 0; the training data are then all other examples without the
    validation data. query_tokens, target_tokens: as in `Task`; None: the task's value.
    """

    sizes: Mapping[str, int | float | None] | None = None
    seed: int = 0
    folds: int | None = None
    fold: int = 0
    query_tokens: int | None = None
    target_tokens: int | None = None


@dataclass(frozen=True)
class Parts:
    """The data of a run and the result of the leakage check."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    leakage: Leakage


def divide(task: Task, pools: Pools, division: Division, tokenizer: Encoder | None = None) -> Parts:
    """The parts of a task. Queries are truncated before the split, so that the leakage check sees the final texts.

    tokenizer: counts tokens; with None no query is truncated and no long target is dropped. Raises DataError (too few
    examples) and ConfigError (cross-validation of a task that has its own test set, a fold that does not exist).
    """
    query_tokens = division.query_tokens or task.query_tokens
    target_tokens = division.target_tokens or task.target_tokens
    train, dropped = _short_targets(_cut(pools.train, query_tokens, tokenizer), target_tokens, tokenizer)
    validation = None if pools.validation is None else _cut(pools.validation, query_tokens, tokenizer)
    test = None if pools.test is None else _cut(pools.test, query_tokens, tokenizer)
    left_out = 0
    group = None if task.grouping is None else task.grouping([*train, *(validation or ()), *(test or ())])
    if task.sizes is None and division.sizes is None and division.folds is None:
        parts = {"train": train, "validation": validation or [], "test": test or []}
    else:
        sizes = {**(task.sizes or {}), **{k: n for k, n in (division.sizes or {}).items() if n is not None}}
        if test is not None:
            if division.folds is not None:
                raise ConfigError(f"data.folds is for data without a test set of their own; {task.name} has one.")
            before = len(train)
            train = without(train, test, group)
            left_out = before - len(train)
            test = split(test, {"test": sizes.get("test", len(test))}, division.seed)["test"]
        parts = _drawn(train, test, sizes, division, group)
    leakage = check_leakage(parts, group, left_out, pools.dropped + dropped)
    return Parts(parts["train"], parts["validation"], parts["test"], leakage)


def _drawn(
    pool: list[Example],
    test: list[Example] | None,
    sizes: Mapping[str, int | float],
    division: Division,
    group: Group | None,
) -> dict[str, list[Example]]:
    order = ("train", "validation", "test") if test is None else ("train", "validation")
    if division.folds is None:
        none = 0.0 if sizes and all(isinstance(size, float) for size in sizes.values()) else 0
        drawn = split(pool, {name: sizes.get(name, none) for name in order}, division.seed, group)
        return {"train": drawn["train"], "validation": drawn["validation"], "test": drawn.get("test", test or [])}
    if not 0 <= division.fold < division.folds:
        last = division.folds - 1
        raise ConfigError(f"data.fold is {division.fold}, but with {division.folds} folds it must be 0 to {last}.")
    parts = folds(pool, division.folds, division.seed, group)
    rest = [example for number, part in enumerate(parts) if number != division.fold for example in part]
    validation = split(rest, {"validation": sizes.get("validation", 0)}, division.seed, group)["validation"]
    train = without(rest, validation, group)
    if not train:
        raise DataError(f"with {len(validation)} validation examples nothing is left to train on.")
    return {"train": train, "validation": validation, "test": parts[division.fold]}


def _cut(examples: Sequence[Example], tokens: int | None, tokenizer: Encoder | None) -> list[Example]:
    if tokens is None or tokenizer is None:
        return list(examples)
    return [
        replace(example, query=cut(example.query, tokens, tokenizer)) if isinstance(example.query, str) else example
        for example in examples
    ]


def cut(text: str, tokens: int, tokenizer: Encoder) -> str:
    """The text of the first `tokens` tokens, without a last token that ends inside a character."""
    ids = tokenizer.encode(text[: tokens * LONGEST])
    if len(ids) < tokens + MARGIN:  # the cut after LONGEST characters may have changed one of the first tokens
        ids = tokenizer.encode(text)
    if len(ids) <= tokens:
        return text
    for count in range(tokens, max(tokens - ATTEMPTS, 0), -1):
        piece = tokenizer.decode(ids[:count], skip_special=False)
        if text.startswith(piece):
            return piece
    return tokenizer.decode(ids[:tokens], skip_special=False).rstrip("\N{REPLACEMENT CHARACTER}")


def _short_targets(examples: list[Example], tokens: int | None, tokenizer: Encoder | None) -> tuple[list[Example], int]:
    """(examples whose targets have at most `tokens` tokens, number of the others)."""
    if tokens is None or tokenizer is None:
        return examples, 0
    kept = [e for e in examples if not isinstance(e.target, str) or len(tokenizer.encode(e.target)) <= tokens]
    return kept, len(examples) - len(kept)
