"""The paper's first experiments and next checks, each as a question that is answered in numbers; see `study.py`."""

from __future__ import annotations

import importlib

from embedgrad.errors import ConfigError
from embedgrad.studies.study import Study

NAMES = ("similarity", "curves", "entropy", "drift", "tau", "prompt-quality")


def find_study(name: str) -> Study:
    """The study of this name. Raises ConfigError."""
    if name not in NAMES:
        raise ConfigError(f"there is no study {name!r}; choose one of {', '.join(NAMES)}, or all.")
    study = importlib.import_module(f"embedgrad.studies.{name.replace('-', '_')}").STUDY
    assert isinstance(study, Study)
    return study
