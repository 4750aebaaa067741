"""Studies: experiments on questions of the paper, answered by numbers. `study.py` defines the interface."""

from __future__ import annotations

import importlib

from embedgrad.compare.studies.study import Study
from embedgrad.util.errors import ConfigError

NAMES = ("similarity", "curves", "entropy", "drift", "tau", "prompt-quality")


def find_study(name: str) -> Study:
    """The study with this name. Raises ConfigError where there is none."""
    if name not in NAMES:
        raise ConfigError(f"there is no study {name!r}; choose one of {', '.join(NAMES)}, or all.")
    study = importlib.import_module(f"embedgrad.compare.studies.{name.replace('-', '_')}").STUDY
    assert isinstance(study, Study)
    return study
