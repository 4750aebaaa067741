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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """EMBEDGRAD_EXAMPLES: at most so many draws in each test, where a GPU's time is short."""
    most = int(os.environ.get("EMBEDGRAD_EXAMPLES", "0"))
    for test in (getattr(item, "obj", None) for item in items if most):
        drawn = getattr(test, "_hypothesis_internal_use_settings", None)  # what @settings leaves
        if drawn is not None and drawn.max_examples > most:
            inner = getattr(test, "__func__", test)
            inner._hypothesis_internal_use_settings = settings(drawn, max_examples=most)


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
