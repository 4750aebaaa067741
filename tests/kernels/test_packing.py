"""The stored forms of frozen matrices: GGUF's blocks bit for bit, and what the quantisers lose."""

import numpy as np
import pytest
import torch
from embedgrad.kernels.packing import (
    PackedWeight,
    from_q4_0,
    from_q4_1,
    from_q8_0,
    quantize_int4,
    quantize_int8,
    stacked,
)
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from .harness import DEVICE, normal

pytestmark = pytest.mark.needs_no_launch
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
READERS = {Type.Q8_0: from_q8_0, Type.Q4_0: from_q4_0, Type.Q4_1: from_q4_1}


@QUICK
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 5), st.sampled_from(list(READERS)), st.booleans())
def test_gguf_blocks_keep_every_bit(seed: int, rows: int, blocks: int, kind: Type, random_bytes: bool) -> None:
    """Also an odd number of blocks, and any bytes as quants with any finite scale."""
    raw = quantize(normal(seed, (rows, 32 * blocks)).cpu().numpy(), kind)
    if random_bytes:
        header = 4 if kind == Type.Q4_1 else 2
        parts = raw.reshape(rows, blocks, -1)
        parts[:, :, header:] = np.random.default_rng(seed).integers(0, 256, parts[:, :, header:].shape)
    weight = READERS[kind](torch.from_numpy(raw))
    assert weight.shape == (rows, 32 * blocks)
    assert np.array_equal(weight.dequantize().cpu().numpy(), dequantize(raw, kind))


@QUICK
@given(
    st.integers(0, 2**31), st.integers(1, 5), st.integers(2, 150), st.sampled_from([32, 64, 128]),
    st.sampled_from([1.0, 1e-4, 1e-7]),
)  # fmt: skip
@example(0, 1, 5, 32, 1.0)  # 27 copies of the last element fill the group
def test_the_quantisers_err_by_half_a_step_and_say_so(seed: int, rows: int, k: int, group: int, scale: float) -> None:
    w = normal(seed, (rows, k), scale=scale)
    for quantiser, levels in ((quantize_int8, 254), (quantize_int4, 15)):
        weight, error = quantiser(w, group)
        found = weight.dequantize(torch.float64)
        assert found.shape == w.shape
        assert error == pytest.approx(float((found - w).norm() / w.double().norm()), rel=1e-6)
        if quantiser is quantize_int8:
            # half a step of the widest group, and the rounding of its scale to 11 bits over 127 steps
            assert float((found - w).abs().max()) <= float(w.abs().max()) * (1 / levels + 2.0**-11)
        else:
            plain = (w.amax() - w.amin()) / levels / 2
            rounding = float(w.abs().max()) * 2.0**-10  # of offset and scale to 11 bits
            assert float((found - w).square().mean().sqrt()) <= float(plain) * 1.01 + rounding


def test_shrinking_the_range_helps_int4() -> None:
    """The search over ranges gives less error than plain minimum and maximum."""
    w = normal(0, (16, 256))
    _, error = quantize_int4(w)
    grouped = w.unflatten(1, (-1, 32))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = ((grouped - low) / step).round() * step + low
    assert error < 0.99 * float((plain - grouped).norm() / w.norm())


def test_the_bytes_of_a_weight() -> None:
    w = normal(0, (64, 256))
    assert quantize_int8(w)[0].bytes == 64 * (256 + 256 // 32 * 2)
    assert quantize_int4(w)[0].bytes == 64 * (128 + 256 // 32 * 4)


def test_constant_and_zero_groups() -> None:
    w = torch.cat([torch.zeros(1, 32, device=DEVICE), torch.full((1, 32), 3.0, device=DEVICE)])
    for quantiser in (quantize_int8, quantize_int4):
        weight, error = quantiser(w)
        assert torch.allclose(weight.dequantize(), w, rtol=1e-3)
        assert error < 1e-3
    assert quantize_int8(torch.zeros(2, 32, device=DEVICE))[1] == 0


def test_rows_and_stacks() -> None:
    parts = [quantize_int4(normal(i, (3 + i, 70)))[0] for i in range(3)]
    whole = stacked(parts)
    assert whole.shape == (12, 70)
    assert torch.equal(whole.dequantize(), torch.cat([p.dequantize() for p in parts]))
    assert torch.equal(whole.rows(3, 7).dequantize(), parts[1].dequantize())
    assert isinstance(whole.to("cpu"), PackedWeight)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Q4_0 rows"):
        from_q4_0(torch.zeros(2, 17, dtype=torch.uint8))
    with pytest.raises(ValueError, match="infinite or NaN"):
        quantize_int8(torch.tensor([[1.0, float("inf")]], device=DEVICE))
    with pytest.raises(ValueError, match="cannot be stacked"):
        stacked([quantize_int4(normal(0, (2, 32)))[0], quantize_int8(normal(0, (2, 32)))[0]])
