"""The kernels' specimens and trials, one module for each family of kernels; a new family is named in FAMILIES."""

from bench.machine_code.specimens import attention, products, rowwise
from bench.machine_code.specimens.base import Specimen, Trial

FAMILIES = (rowwise, attention, products)


def specimens() -> list[Specimen]:
    """Every specimen of every family."""
    return [specimen for family in FAMILIES for specimen in family.specimens()]


def trials() -> list[Trial]:
    """Every trial of every family."""
    return [trial for family in FAMILIES for trial in family.trials()]
