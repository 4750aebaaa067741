"""Builds the core once per session; skips where there is no compiler."""

from __future__ import annotations

import subprocess

import pytest

from tests.csrc.core import CPU, CSRC, KERNELS, Core, build, compiler


@pytest.fixture(scope="session")
def has_compiler() -> None:
    if compiler() is None:
        pytest.skip("no C++ compiler: neither CXX nor c++, g++ or clang++")


@pytest.fixture(scope="session")
def core(has_compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Core:
    folder, cpu, kernels = tmp_path_factory.mktemp("core"), [CSRC / f for f in CPU], [CSRC / f for f in KERNELS]
    try:
        return Core(build(folder, cpu, kernels, ["-Wall", "-Wextra", "-Werror"]))
    except subprocess.CalledProcessError as error:
        pytest.fail(f"the core does not build:\n{error.stderr}")
