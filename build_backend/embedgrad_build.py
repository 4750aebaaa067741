"""The build backend: setuptools' own, which can see the torch of the environment that is built for.

csrc/ must be compiled against the torch it will be loaded with. An isolated build hides that one, and a torch in
`build-system.requires` would be a second, perhaps another, of some hundred megabytes. So the interpreter is asked where
its own packages lie, and only where there is no torch among them the front end is asked for one: then the environment
gets it as a dependency in any case. `python -m build` builds in a virtual environment of its own; the torch is then
that of EMBEDGRAD_BUILD_PYTHON (an interpreter), or of the active virtual environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable", "get_requires_for_build_sdist",
    "get_requires_for_build_wheel", "prepare_metadata_for_build_editable", "prepare_metadata_for_build_wheel",
]  # fmt: skip

_ASK = """
import importlib.util, json, sys
print(json.dumps([sys.version_info[:2], sys.path if importlib.util.find_spec("torch") else []]))
"""
_HIDING = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")  # how pip hides the environment's packages


def _interpreters() -> list[str]:
    """Those whose torch may be meant, the most explicit first."""
    active = os.environ.get("VIRTUAL_ENV")
    asked = [os.environ.get("EMBEDGRAD_BUILD_PYTHON"), sys.executable, active and str(Path(active) / "bin" / "python")]
    return [python for python in asked if python]


def _packages_with_torch() -> list[str]:
    """The import path of the first interpreter of this version that has torch; empty: none has."""
    environment = {name: value for name, value in os.environ.items() if name not in _HIDING}
    for python in _interpreters():
        try:
            said = subprocess.run([python, "-c", _ASK], env=environment, capture_output=True, text=True, check=True)
            version, path = json.loads(said.stdout.splitlines()[-1])
        except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
            continue
        if path and tuple(version) == sys.version_info[:2]:
            return [folder for folder in path if folder]
    return []


def _see_torch() -> None:
    """Make the environment's packages importable, behind those that this build brings itself."""
    sys.path += [folder for folder in _packages_with_torch() if folder not in sys.path]


def _wanted() -> list[str]:
    return [] if os.environ.get("EMBEDGRAD_BUILD_EXT") == "0" or _packages_with_torch() else ["torch"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """setuptools' wishes, and torch where the environment has none."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_wanted()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """As for a wheel."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_wanted()]


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """setuptools' wheel, csrc/ compiled where torch is to be seen."""
    _see_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """As `build_wheel`, into this folder."""
    _see_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
