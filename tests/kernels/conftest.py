"""Chooses where the kernels run, before anything imports Triton, and checks every canary after each test."""

import os
import sys
from collections.abc import Iterator

import pytest

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from . import harness

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_no_launch: launches no kernel in this process")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the interpreter and without a GPU no kernel of this folder can be launched."""
    if INTERPRETED or torch.cuda.is_available():
        return
    reason = pytest.mark.skip(reason="no GPU, and TRITON_INTERPRET is not 1 (set it before anything imports triton)")
    for item in items:
        if item.path.parent.name == "kernels" and "needs_no_launch" not in item.keywords:
            item.add_marker(reason)


@pytest.fixture(autouse=True)
def no_tensor_without_a_device() -> Iterator[None]:
    """A tensor that a test makes without naming a device has no memory, so that the test fails without a GPU, too."""
    with torch.device("meta"):
        yield


@pytest.fixture(autouse=True)
def canaries() -> Iterator[None]:
    """Every guarded tensor of a test is checked when the test ends; none is carried over to the next."""
    harness.forget_guards()
    yield
    harness.check_canaries()
