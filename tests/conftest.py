"""What several test folders share; also says that Triton interprets, before anything imports it (0: on a GPU)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("TRITON_INTERPRET", "1")

from embedgrad.data.example import Example
from embedgrad.tasks import movie_snippets, smollm2
from embedgrad.util.errors import DataError

# The same draws at every run, so that a change is what makes a test fail; HYPOTHESIS_PROFILE=default draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, whose children Ctrl-C would not stop
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real SmolLM2-135M-Instruct; skips where it is neither cached nor to be downloaded."""
    try:
        return smollm2.path()
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def snippets() -> list[Example]:
    """Real labelled sentences; skips where they are neither cached nor to be downloaded."""
    try:
        return movie_snippets.load()
    except DataError as error:
        pytest.skip(str(error))
