"""Specimens of the attention kernels."""

from . import Specimen, Trial


def specimens() -> list[Specimen]:
    return []


def trials() -> list[Trial]:
    return []
