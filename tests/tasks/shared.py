"""The folder of the real data sets, where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def data_folder() -> Path:
    """Skips, with the reason, where EMBEDGRAD_DATA is not set."""
    folder = os.environ.get("EMBEDGRAD_DATA")
    if not folder:
        pytest.skip("EMBEDGRAD_DATA is not set: the folder of the real data sets")
    return Path(folder)
