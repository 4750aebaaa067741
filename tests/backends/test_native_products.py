"""Products with a few rows in csrc/decode/: float matrices, and every quantised type with activations in bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from embedgrad.kernels.packing import quantize_int8
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedgrad.backends.native_core import library
from embedgrad.model.native_matrices import few_rows, native_matrix
from embedgrad.model.quantised import QUANTISED, TileWeight
from tests.model.blocks import random_blocks
from tests.truth import relative_error

try:
    from embedgrad.backends import native as core
except ImportError as error:
    pytest.skip(f"csrc/ is not built: {error}", allow_module_level=True)
native = core.OPS

SETS = core.INSTRUCTION_SETS[: core.INSTRUCTION_SETS.index(core.instruction_set()) + 1]
FORMS = ("float32", "bfloat16", "float16", *QUANTISED)
drawn = settings(max_examples=200, deadline=None)
cases = given(
    st.integers(0, 2**31), st.sampled_from(FORMS), st.integers(1, 40), st.integers(1, 620), st.integers(1, 19),
    st.sampled_from(SETS),
)  # fmt: skip


def weight(seed: int, form: str, rows: int, columns: int) -> Any:
    """A matrix of `form` in which some rows before the first one belong to another matrix."""
    draw = torch.Generator().manual_seed(seed)
    before = seed % 3
    if form in QUANTISED:
        return TileWeight.of(random_blocks(form, rows + before, columns, draw)).rows(before, before + rows)
    return torch.randn(rows + before, columns, generator=draw).to(getattr(torch, form))[before:]


def in_bytes(x: Tensor, padded: int, fused: bool) -> Tensor:
    """Activations [B, K] as csrc/decode/linear.h rounds them, float64; `fused`: where a product is rounded to a whole
    number at once, as machines with fused multiply-add do."""
    grouped = torch.nn.functional.pad(x, (0, padded - x.shape[1])).unflatten(1, (-1, 32))
    scales = grouped.abs().amax(-1) / 127
    inverse = torch.where(scales > 0, 127 / grouped.abs().amax(-1), 0)[:, :, None]
    q = (grouped.double() * inverse.double() if fused else grouped * inverse).round()
    return (q.double() * scales.double()[:, :, None]).flatten(1)


def error(y: Tensor, weights: list[Any], x: Tensor, bias: Tensor | None) -> float:
    """Error of the products, relative to Σ |w| |x|."""
    dense = torch.cat([w.double() if isinstance(w, Tensor) else w.dequantize(torch.float64) for w in weights])
    size = float((x.double().abs() @ dense.abs().T + (0 if bias is None else bias.abs())).norm())
    found = []
    for fused in (True, False):
        truth = torch.cat([_product(w, x, fused) for w in weights], dim=1) + (0 if bias is None else bias)
        found.append(float((y - truth).norm()) / size)
    return min(found)


def _product(w: Any, x: Tensor, fused: bool) -> Tensor:
    if isinstance(w, Tensor):
        return x.double() @ w.double().T
    return in_bytes(x, w.shape[1], fused) @ w.dequantize(torch.float64).T


@drawn
@cases
def test_products(seed: int, form: str, rows: int, columns: int, batch: int, name: str) -> None:
    w = weight(seed, form, rows, columns)
    columns = w.shape[1]
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed + 1)) * 10.0 ** (seed % 7 - 3)
    bias = torch.linspace(-1, 1, rows) if seed % 2 else None
    matrix = native_matrix([w], bias)
    assert matrix is not None
    with core.using(name):
        y = few_rows(matrix, x, library())
    assert error(y, [w], x, bias) < 1e-6


@drawn
@cases
def test_a_row_does_not_depend_on_the_others(
    seed: int, form: str, rows: int, columns: int, batch: int, name: str
) -> None:
    """To the bit, whoever stands beside it, NaN and infinity among them; and a row of those is NaN itself."""
    w = weight(seed, form, rows, columns)
    x = torch.randn(batch, w.shape[1], generator=torch.Generator().manual_seed(seed + 1))
    matrix = native_matrix([w], None)
    assert matrix is not None
    with core.using(name):
        together = few_rows(matrix, x, library())
        alone = torch.cat([few_rows(matrix, row[None], library()) for row in x])
        x[seed % batch, seed % w.shape[1]] = float("nan") if seed % 2 else float("inf")
        spoilt = few_rows(matrix, x, library())
    assert torch.equal(together, alone)
    others = torch.arange(batch) != seed % batch
    assert torch.equal(spoilt[others], together[others])
    if not isinstance(w, Tensor):
        assert bool(spoilt[seed % batch].isnan().all())


@pytest.mark.parametrize("form", QUANTISED)
def test_every_instruction_set_gives_the_same_bits(form: str) -> None:
    """Of the same activations: exact integers inside a group, and the groups in the same order."""
    w = weight(6, form, 37, 544)
    matrix = native_matrix([w], None)
    assert matrix is not None
    for batch in (1, 2, 5, 13):
        x = torch.randn(batch, w.shape[1], generator=torch.Generator().manual_seed(batch))
        said = {}
        for name in SETS:
            with core.using(name):
                said[name] = few_rows(matrix, x, library())
        assert all(torch.equal(y, said["plain"]) for y in said.values()), batch


@drawn
@given(
    st.integers(0, 2**31), st.sampled_from([kind for kind in QUANTISED if kind != "int4"]), st.integers(1, 20),
    st.integers(1, 256), st.sampled_from((1, 2, 3, 7, 16)), st.sampled_from(SETS),
)  # fmt: skip
def test_whole_numbers_are_multiplied_exactly(
    seed: int, form: str, rows: int, columns: int, batch: int, name: str
) -> None:
    """Where neither activations nor scales need rounding, the product is that of the dequantised matrix."""
    draw = torch.Generator().manual_seed(seed)
    w = TileWeight.of(random_blocks(form, rows, columns, draw, exact=True))
    x = torch.randint(-3, 4, (batch, w.shape[1] // 32, 32), generator=draw).float()
    x.scatter_(2, torch.randint(0, 32, (*x.shape[:2], 1), generator=draw), 127.0)  # the scale of a group is then 1
    x = x.flatten(1)
    matrix = native_matrix([w], None)
    assert matrix is not None
    with core.using(name):
        y = few_rows(matrix, x, library())
    assert torch.equal(y.double(), x.double() @ w.dequantize(torch.float64).T)


@pytest.mark.parametrize("form", QUANTISED)
def test_the_rounding_of_activations(form: str) -> None:
    """What products lose by it, relative to dequantised float64 products of normal activations."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    w = weight(1, form, 256, 512)
    matrix = native_matrix([w], None)
    assert matrix is not None
    loss = relative_error(few_rows(matrix, x, library()), x.double() @ w.dequantize(torch.float64).T)
    assert 1e-3 < loss < 8e-3


def test_parts_stored_differently_and_threads() -> None:
    parts = [weight(1, "Q4_1", 24, 96), weight(2, "Q8_0", 17, 96), weight(3, "bfloat16", 9, 96)]
    x, bias = torch.randn(5, 96, generator=torch.Generator().manual_seed(4)), torch.randn(50)
    matrix = native_matrix(parts, bias)
    assert matrix is not None
    y = few_rows(matrix, x, library())
    assert error(y, parts, x, bias) < 1e-6
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(few_rows(matrix, x, library()), y)
    finally:
        torch.set_num_threads(threads)


def test_what_csrc_has_no_product_for() -> None:
    assert native_matrix([torch.zeros(2, 2, dtype=torch.float64)], None) is None
    assert native_matrix([quantize_int8(torch.ones(2, 64), group=64)[0]], None) is None
