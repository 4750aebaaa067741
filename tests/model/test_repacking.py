"""GGUF's blocks come into our layout with the same bytes, whoever moves them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedgrad.model.repacking import BLOCK_BYTES, REPACKED, repacked

native_core = pytest.importorskip("embedgrad.backends.native_core")
try:
    native_core.library()
except ImportError as error:
    pytest.skip(f"csrc/ is not there ({error})", allow_module_level=True)


@given(
    kind=st.sampled_from(sorted(REPACKED)), rows=st.integers(1, 5), count=st.integers(1, 7), seed=st.integers(0, 99),
    apart=st.integers(0, 3),
)  # fmt: skip
def test_the_bytes_are_those_of_the_portable_way(kind: str, rows: int, count: int, seed: int, apart: int) -> None:
    width = count * BLOCK_BYTES[kind]
    numbers = torch.randint(0, 256, (rows, width + apart), generator=torch.Generator().manual_seed(seed))
    blocks = numbers.to(torch.uint8)[:, :width]
    found, expected = repacked(kind, blocks), REPACKED[kind](blocks.contiguous())
    assert (found.kind, found.shape, found.group) == (expected.kind, expected.shape, expected.group)
    for mine, other in zip(found.tensors(), expected.tensors(), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert mine.dtype == other.dtype
            assert mine.shape == other.shape
            assert mine.numpy().tobytes() == other.numpy().tobytes()
