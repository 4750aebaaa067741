"""Products with a few rows in csrc/decode/: float matrices, and int8 and int4 blocks with activations in bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from embedgrad.kernels.packing import PackedWeight, from_q4_0, quantize_int4, quantize_int8
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedgrad.backends.native_core import library
from embedgrad.model.gguf_blocks import GGUF_BLOCKS, BlockWeight
from embedgrad.model.native_matrices import few_rows, native_matrix, widen
from tests.truth import relative_error

try:
    from embedgrad.backends import native as core
except ImportError as error:
    pytest.skip(f"csrc/ is not built: {error}", allow_module_level=True)
native = core.OPS

SETS = core.INSTRUCTION_SETS[: core.INSTRUCTION_SETS.index(core.instruction_set()) + 1]
PACKED = ("int8", "int8 with offsets", "int4", "int4 without offsets")
FORMS = ("float32", "bfloat16", "float16", *PACKED, *GGUF_BLOCKS)
SCALES_AT = {"Q5_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}  # bytes of a block where a float16 begins
drawn = settings(max_examples=150, deadline=None)
cases = given(
    st.integers(0, 2**31), st.sampled_from(FORMS), st.integers(1, 40), st.integers(1, 620), st.integers(1, 19),
    st.sampled_from(SETS),
)  # fmt: skip


def weight(seed: int, form: str, rows: int, columns: int) -> Any:
    draw = torch.Generator().manual_seed(seed)
    if form in GGUF_BLOCKS:
        return blocks_of(form, rows, columns, draw)
    w = torch.randn(rows, columns, generator=draw)
    if form.startswith("int8"):
        q = quantize_int8(w)[0]
        offsets = torch.randn(q.scales.shape, generator=draw).to(q.scales.dtype) if form.endswith("offsets") else None
        return PackedWeight(q.kind, q.packed, q.scales, offsets, q.group, q.shape)
    if form == "int4":
        return quantize_int4(w)[0]
    if form == "int4 without offsets":
        blocks = torch.randint(0, 256, (rows, -(-columns // 32), 18), generator=draw, dtype=torch.uint8)
        blocks[:, :, :2] = torch.rand(blocks.shape[:2], generator=draw).half()[..., None].view(torch.uint8)
        return from_q4_0(blocks.flatten(1))
    return w.to(getattr(torch, form))


def blocks_of(form: str, rows: int, columns: int, draw: torch.Generator) -> BlockWeight:
    """Random blocks of a GGUF type, with scales that are numbers."""
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[form]]
    blocks = torch.randint(0, 256, (rows, -(-columns // elements), size), generator=draw, dtype=torch.uint8)
    for at in SCALES_AT[form]:
        scales = (torch.rand(blocks.shape[:2], generator=draw) + 0.01).half()
        blocks[:, :, at : at + 2] = scales[..., None].view(torch.uint8)
    return BlockWeight(form, blocks.flatten(1), (rows, blocks.shape[1] * elements))


@pytest.mark.parametrize("form", GGUF_BLOCKS)
@pytest.mark.parametrize("name", SETS)
def test_a_files_blocks_are_widened_to_what_gguf_gives(form: str, name: str) -> None:
    w = blocks_of(form, 9, 600, torch.Generator().manual_seed(5))
    truth = torch.from_numpy(dequantize(w.blocks.numpy(), GGMLQuantizationType[form]))
    with core.using(name):
        assert torch.equal(w.dequantize(), truth)
        assert torch.equal(w.rows(2, 5).dequantize(), truth[2:5])
        assert torch.equal(w.take(torch.tensor([7, 0, 7])).dequantize(), truth[[7, 0, 7]])


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("name", SETS)
def test_packed_weights_are_widened_as_torch_does(form: str, name: str) -> None:
    for columns in (32, 70, 96, 300):
        w = weight(3, form, 7, columns)
        matrix = native_matrix([w], None)
        assert matrix is not None
        out = torch.full(w.shape, float("nan"))
        with core.using(name):
            widen(matrix, 0, len(out), out)
        assert torch.equal(out, w.dequantize())


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
    if isinstance(w, BlockWeight):
        return in_bytes(x, w.shape[1], fused) @ w.dequantize(torch.float64).T
    padded = w.scales.shape[1] * 32
    whole = PackedWeight(w.kind, w.packed, w.scales, w.offsets, w.group, (w.shape[0], padded))
    return in_bytes(x, padded, fused) @ whole.dequantize(torch.float64).T


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


@pytest.mark.skipif("avx2" not in SETS, reason="this machine has no AVX2")
@pytest.mark.parametrize("form", PACKED)
def test_machines_with_different_vectors_give_the_same_bits(form: str) -> None:
    """Of the same activations: exact integers inside a group, and the groups in the same order."""
    w = weight(6, form, 37, 544)
    matrix = native_matrix([w], None)
    assert matrix is not None
    for batch in (1, 2, 13):
        x = torch.randn(batch, 544, generator=torch.Generator().manual_seed(batch))
        said = {}
        for name in SETS[SETS.index("avx2") :]:
            with core.using(name):
                said[name] = few_rows(matrix, x, library())
        assert all(torch.equal(y, said["avx2"]) for y in said.values()), batch


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
