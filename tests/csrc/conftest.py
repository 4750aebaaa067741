"""Builds the core once per session; skips where there is no compiler."""

from __future__ import annotations

import subprocess

import pytest

from tests.csrc.core import Core, build, compiler


@pytest.fixture(scope="session")
def has_compiler() -> None:
    if compiler() is None:
        pytest.skip("no C++ compiler: neither CXX nor c++, g++ or clang++")


@pytest.fixture(scope="session")
def core(has_compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Core:
    try:
        return Core(build(tmp_path_factory.mktemp("core"), ["-Wall", "-Wextra", "-Werror"]))
    except subprocess.CalledProcessError as error:
        pytest.fail(f"the core does not build:\n{error.stderr}")
