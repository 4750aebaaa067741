"""Products with a few rows in csrc/decode/: float matrices, and int8 and int4 blocks with activations in bytes."""

from __future__ import annotations

import pytest
import torch
from embedgrad.kernels.packing import PackedWeight, from_q4_0, quantize_int4, quantize_int8
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedgrad.backends.native_core import library
from embedgrad.model.native_matrices import few_rows, native_matrix
from tests.truth import relative_error

try:
    from embedgrad.backends import native
except ImportError as error:
    pytest.skip(f"csrc/ is not built: {error}", allow_module_level=True)

SETS = native.INSTRUCTION_SETS[: native.INSTRUCTION_SETS.index(native.instruction_set()) + 1]
FORMS = ("float32", "bfloat16", "float16", "int8", "int4", "int4 without offsets")
drawn = settings(max_examples=150, deadline=None)
cases = given(
    st.integers(0, 2**31), st.sampled_from(FORMS), st.integers(1, 40), st.integers(1, 300), st.integers(1, 11),
    st.sampled_from(SETS),
)  # fmt: skip


def weight(seed: int, form: str, rows: int, columns: int) -> Tensor | PackedWeight:
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=draw)
    if form == "int8":
        return quantize_int8(w)[0]
    if form == "int4":
        return quantize_int4(w)[0]
    if form == "int4 without offsets":
        blocks = torch.randint(0, 256, (rows, -(-columns // 32), 18), generator=draw, dtype=torch.uint8)
        blocks[:, :, :2] = torch.rand(blocks.shape[:2], generator=draw).half()[..., None].view(torch.uint8)
        return from_q4_0(blocks.flatten(1))
    return w.to(getattr(torch, form))


def in_bytes(x: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    """Activations [B, K] as csrc/decode/linear.h rounds them: multiples [B, groups, 32] of scales [B, groups]."""
    grouped = torch.nn.functional.pad(x, (0, padded - x.shape[1])).unflatten(1, (-1, 32))
    scales = grouped.abs().amax(-1) / 127
    inverse = torch.where(scales > 0, 127 / grouped.abs().amax(-1), 0)
    return (grouped * inverse[:, :, None]).round(), scales


def expected(w: Tensor | PackedWeight, x: Tensor) -> Tensor:
    if isinstance(w, Tensor):
        return x.double() @ w.double().T
    padded = w.scales.shape[1] * 32
    q, scales = in_bytes(x, padded)
    whole = PackedWeight(w.kind, w.packed, w.scales, w.offsets, w.group, (w.shape[0], padded))
    return (q.double() * scales.double()[:, :, None]).flatten(1) @ whole.dequantize(torch.float64).T


@drawn
@cases
def test_products(seed: int, form: str, rows: int, columns: int, batch: int, name: str) -> None:
    w = weight(seed, form, rows, columns)
    columns = w.shape[1]
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed + 1)) * 10 ** torch.randn(1).item()
    bias = torch.linspace(-1, 1, rows) if seed % 2 else None
    matrix = native_matrix([w], bias)
    assert matrix is not None
    with native.using(name):
        y = few_rows(matrix, x, library())
    truth = expected(w, x) + (0 if bias is None else bias)
    assert relative_error(y, truth) < 1e-5


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
    with native.using(name):
        together = few_rows(matrix, x, library())
        alone = torch.cat([few_rows(matrix, row[None], library()) for row in x])
        x[seed % batch, seed % w.shape[1]] = float("nan") if seed % 2 else float("inf")
        spoilt = few_rows(matrix, x, library())
    assert torch.equal(together, alone)
    others = torch.arange(batch) != seed % batch
    assert torch.equal(spoilt[others], together[others])
    if not isinstance(w, Tensor):
        assert bool(spoilt[seed % batch].isnan().all())


def test_the_rounding_of_activations() -> None:
    """What int4 and int8 products lose by it, relative to dequantised float64 products of normal activations."""
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    for form in ("int8", "int4"):
        w = weight(1, form, 256, 576)
        assert isinstance(w, PackedWeight)
        matrix = native_matrix([w], None)
        assert matrix is not None
        loss = relative_error(few_rows(matrix, x, library()), x.double() @ w.dequantize(torch.float64).T)
        assert 1e-3 < loss < 8e-3


def test_parts_stored_differently_and_threads() -> None:
    parts = [weight(1, "int4", 24, 96), weight(2, "int8", 17, 96), weight(3, "bfloat16", 9, 96)]
    x, bias = torch.randn(5, 96, generator=torch.Generator().manual_seed(4)), torch.randn(50)
    matrix = native_matrix(parts, bias)
    assert matrix is not None
    y = few_rows(matrix, x, library())
    assert relative_error(y, torch.cat([expected(w, x) for w in parts], dim=1) + bias) < 1e-5
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(few_rows(matrix, x, library()), y)
    finally:
        torch.set_num_threads(threads)


def test_what_csrc_has_no_product_for() -> None:
    assert native_matrix([torch.zeros(2, 2, dtype=torch.float64)], None) is None
    assert native_matrix([quantize_int8(torch.ones(2, 64), group=64)[0]], None) is None
