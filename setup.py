"""Maps the top-level folder `kernels/` to the package `embedgrad.kernels`; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["embedgrad", "embedgrad.*"]), "embedgrad.kernels"],
    package_dir={"embedgrad": "embedgrad", "embedgrad.kernels": "kernels"},
)
