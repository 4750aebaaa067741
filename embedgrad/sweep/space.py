"""The settings that a sweep varies, and what a trial gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedgrad.train.settings import RangeSection, RunConfig, SweepSection, load_run_config
from embedgrad.util.errors import ConfigError

VARIED = ("optimize", "prompt", "template")
"""Sections that a sweep may vary. With other data or another model the trials could not be compared."""


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """The values as `--set` takes them."""
    return [f"{key}={_yaml(value)}" for key, value in values.items()]


def _yaml(value: Any) -> str:
    """JSON is YAML, but for numbers such as 1e-05, which YAML 1.1 takes for text."""
    return f"{value:.17f}".rstrip("0") + "0" if isinstance(value, float) and "e-" in repr(value) else json.dumps(value)


def check_space(path: Path, overrides: Sequence[str], section: SweepSection) -> None:
    """Raises ConfigError where a parameter is no setting of a run, or one of its values is not allowed there."""
    for key, values in section.parameters.items():
        if key.partition(".")[0] not in VARIED:
            raise ConfigError(
                f"sweep.parameters: {key} cannot be varied; a sweep varies settings of {_listed(VARIED)}."
            )
        ends = (values.low, values.high) if isinstance(values, RangeSection) else values
        for value in ends:
            try:
                load_run_config(path, [*overrides, *overrides_of({key: value})])
            except ConfigError as error:
                raise ConfigError(f"sweep.parameters: {key} cannot be {json.dumps(value)}: {error}") from error
    if section.sampler == "grid" and any(isinstance(each, RangeSection) and each.step is None and not _whole(each)
                                         for each in section.parameters.values()):  # fmt: skip
        raise ConfigError("sweep.sampler is grid, but a range has no step; give a step, or a list of values.")


def trial_config(path: Path, overrides: Sequence[str], values: Mapping[str, Any], name: str, folder: str) -> RunConfig:
    """The configuration of a trial with these values, to be run in `folder`/`name`."""
    given = [*overrides, *overrides_of(values), *overrides_of({"run.name": name, "run.folder": folder})]
    return load_run_config(path, given)


def suggest(trial: Any, section: SweepSection) -> dict[str, Any]:
    """The values that Optuna's `trial` gives the parameters."""
    found: dict[str, Any] = {}
    for key, values in section.parameters.items():
        if not isinstance(values, RangeSection):
            found[key] = trial.suggest_categorical(key, [_plain(value) for value in values])
        elif _whole(values):
            found[key] = trial.suggest_int(key, values.low, values.high, step=int(values.step or 1), log=values.log)
        else:
            found[key] = trial.suggest_float(key, values.low, values.high, step=values.step, log=values.log)
    return given(found, section)


def given(chosen: Mapping[str, Any], section: SweepSection) -> dict[str, Any]:
    """The settings of which Optuna keeps the values `chosen`."""
    found = dict(chosen)
    for key, values in section.parameters.items():
        if not isinstance(values, RangeSection) and key in found:
            found[key] = next(value for value in values if _plain(value) == found[key])
    return found


def grid(section: SweepSection) -> dict[str, list[Any]]:
    """All values of every parameter."""
    found: dict[str, list[Any]] = {}
    for key, values in section.parameters.items():
        if not isinstance(values, RangeSection):
            found[key] = [_plain(value) for value in values]
            continue
        step = values.step or 1
        count = int((values.high - values.low) / step + 1e-9) + 1
        found[key] = [values.low + step * number for number in range(count)]
    return found


def _whole(values: RangeSection) -> bool:
    ends = (values.low, values.high, *(() if values.step is None else (values.step,)))
    return all(isinstance(end, int) for end in ends)


def _plain(value: Any) -> Any:
    """A value as Optuna keeps it: numbers, texts and None as they are, all else as JSON."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, sort_keys=True)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
