"""Reads a run's folder without its model. Missing or damaged files are described in sentences."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from embedgrad.maths.trust_region import norm_ratio
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.train.run_folder import holds_run, read_metrics
from embedgrad.util.bounded_yaml import BoundedLoader
from embedgrad.util.errors import ConfigError, PromptError
from embedgrad.util.interrupts import REASONS

Record = dict[str, Any]


@dataclass(frozen=True)
class Token:
    """A prompt row of the best prompt.

    text, id: its token. similarity, norm_ratio: to its anchor. before, after: the nearest token of the vocabulary as
    (text or id, cosine, rank of the prompt row's own token), before the first step and for the best prompt; None where
    no validation has recorded it.
    """

    text: str
    id: int
    similarity: float
    norm_ratio: float
    before: tuple[str, float, int] | None
    after: tuple[str, float, int] | None


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder.

    config, config_text: config.yaml as values and as text. steps, validations, alarms: the records of metrics.jsonl.
    summary, test: summary.json and test.json ({"before": evaluation, "after": evaluation}), empty where there is no
    file. prompt: the best prompt so far. tokens: its prompt rows. token_names: names of its tokens. missing: a sentence
    for each part that is absent or cannot be read.
    """

    path: Path
    name: str
    config: Record
    config_text: str
    steps: list[Record]
    validations: list[Record]
    alarms: list[Record]
    summary: Record
    test: dict[str, Record]
    prompt: SoftPrompt | None
    tokens: list[Token] = field(default_factory=list)
    token_names: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def setting(self, *keys: str) -> Any:
        """A value in config.yaml, such as `setting("optimize", "trust_region", "tau")`; None where it is not set."""
        return find(self.config, *keys)

    @property
    def best_step(self) -> int | None:
        """The step of the best prompt; None where it is not known."""
        step = self.summary.get("best_step", find(self.prompt.metadata, "metrics", "step") if self.prompt else None)
        return step if isinstance(step, int) else None


def find(values: Any, *keys: str) -> Any:
    """values[a][b]...; None where a key is missing."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def number(value: Any) -> float | None:
    """`value` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return found if math.isfinite(found) else None


def read_run(path: Path) -> Run:
    """The run in the folder `path`. Raises ConfigError where there is no run or metrics.jsonl cannot be read."""
    if not path.is_dir():
        raise ConfigError(f"there is no folder {path}; give a run's folder, such as runs/demo.")
    if not holds_run(path):
        raise ConfigError(
            f"{path} holds no run; give a folder that `embedgrad optimize` has written, such as runs/demo."
        )
    missing: list[str] = []
    config, config_text = _config(path, missing)
    records = [record for record in read_metrics(path)[0] if isinstance(record.get("step"), int)]
    steps, validations, alarms = (
        [record for record in records if record.get("kind") == kind] for kind in ("step", "validation", "alarm")
    )
    if not steps:
        missing.append("No step has been recorded (metrics.jsonl is missing or empty).")
    if not validations:
        missing.append(
            "There was no validation, so nothing says how the prompt does on examples it was not trained on."
        )
    summary = _json(path / "summary.json", missing)
    if not summary:
        last = steps[-1]["step"] if steps else 0
        missing.append(
            f"There is no usable summary.json: the run is still going on, or was cut off after step {last}; "
            "`embedgrad optimize ... --resume` ends it."
        )
    elif summary.get("stop_reason") in REASONS:
        missing.append(
            f"The run was {summary['stop_reason']} after step {summary.get('steps')}; "
            "`embedgrad optimize ... --resume` goes on with it."
        )
    test = {when: one for when, one in _json(path / "test.json", missing).items() if isinstance(one, dict)}
    if not test and "generated_accuracy" not in summary:
        missing.append("The prompt was not tried on test data, so there is no before and after on unseen examples.")
    elif not test:
        missing.append("There is no test.json, so the answers themselves cannot be shown.")
    prompt = _prompt(path / "prompt.safetensors", missing)
    texts = _texts(summary, validations, prompt)
    run = Run(
        path, path.resolve().name, config, config_text, steps, validations, alarms, summary, test, prompt,
        missing=missing,
    )  # fmt: skip
    run.tokens.extend(_tokens(run, texts))
    run.token_names.extend(_names(run, texts))
    return run


def _config(path: Path, missing: list[str]) -> tuple[Record, str]:
    try:
        text = (path / "config.yaml").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        missing.append("There is no readable config.yaml, so the settings are not known.")
        return {}, ""
    try:
        values = yaml.load(text, BoundedLoader)
    except Exception:  # PyYAML also lets errors of Python's conversions through
        missing.append("config.yaml is not YAML; it is shown as it is.")
        values = {}
    return (values if isinstance(values, dict) else {}), text


def _json(path: Path, missing: list[str]) -> Record:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        missing.append(f"{path.name} is damaged and was left out.")
        return {}
    return values


def _prompt(path: Path, missing: list[str]) -> SoftPrompt | None:
    try:
        return SoftPrompt.load(path)
    except PromptError:
        missing.append("There is no usable prompt.safetensors, so the prompt's tokens cannot be shown.")
        return None


def _texts(summary: Record, validations: list[Record], prompt: SoftPrompt | None) -> dict[int, str]:
    """Texts of token ids, from all records of the run that have them."""
    known: dict[int, str] = {}
    for record in validations:
        known.update(_pairs(record.get("nearest"), record.get("nearest_texts")))
    return known | _pairs(prompt.token_ids if prompt is not None else None, summary.get("token_texts"))


def _pairs(ids: Any, texts: Any) -> dict[int, str]:
    if not isinstance(ids, list) or not isinstance(texts, list) or len(ids) != len(texts):
        return {}
    return {id: text for id, text in zip(ids, texts, strict=True) if isinstance(id, int) and isinstance(text, str)}


def shown(text: str) -> str:
    """A token's text with visible white space."""
    for sign, visible in ((" ", "␣"), ("\n", "↵"), ("\t", "⇥"), ("\r", "␍")):
        text = text.replace(sign, visible)
    return text


def _named(id: int, texts: dict[int, str]) -> str:
    return shown(texts[id]) if texts.get(id) else f"id {id}"


def _names(run: Run, texts: dict[int, str]) -> list[str]:
    if run.prompt is not None:
        return [_named(id, texts) for id in run.prompt.token_ids]
    rows = run.steps[-1].get("similarity") if run.steps else None
    return [f"row {row}" for row in range(len(rows))] if isinstance(rows, list) else []


def _tokens(run: Run, texts: dict[int, str]) -> list[Token]:
    if run.prompt is None:
        return []
    looked = [record for record in run.validations if isinstance(record.get("nearest"), list)]
    first = next((record for record in looked if record["step"] == 0), None)
    best = next((record for record in looked if record["step"] == run.best_step), None)
    similarity = run.prompt.similarity().tolist()
    ratio = norm_ratio(run.prompt.embeddings, run.prompt.anchor).tolist()
    return [
        Token(_named(id, texts), id, similarity[row], ratio[row], _near(first, row, texts), _near(best, row, texts))
        for row, id in enumerate(run.prompt.token_ids)
    ]


def _near(record: Record | None, row: int, texts: dict[int, str]) -> tuple[str, float, int] | None:
    if record is None:
        return None
    try:
        id, cosine, rank = record["nearest"][row], record["nearest_cosine"][row], record["own_rank"][row]
        return _named(int(id), texts), float(cosine), int(rank)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return None
