"""A fault planted into a kernel is found by that kernel's tests."""

import pytest

from .faults import FAULTS, failed_tests, sources
from .harness import INTERPRETED


@pytest.mark.needs_no_launch
@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_still_applies(name: str) -> None:
    compile(sources(FAULTS[name]), name, "exec")


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="plants faults in sources, for the interpreter")
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults(name: str) -> None:
    assert failed_tests(name)
