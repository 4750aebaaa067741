"""Quantised matrices on the CPU: blocks of a file and tiles of csrc/ stand for what the gguf package says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.model.native_matrices import is_built, native_matrix
from embedgrad.model.quantised import QUANTISED, TileWeight
from tests.model.blocks import meaning, random_blocks

if not is_built():
    pytest.skip("csrc/ is not built", allow_module_level=True)

from embedgrad.backends import native as core

SETS = core.INSTRUCTION_SETS[: core.INSTRUCTION_SETS.index(core.instruction_set()) + 1]


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(QUANTISED), rows=st.integers(1, 50), columns=st.integers(1, 700), name=st.sampled_from(SETS),
    seed=st.integers(0, 2**31), apart=st.integers(0, 5), cut=st.tuples(st.integers(0, 50), st.integers(0, 50)),
)  # fmt: skip
def test_blocks_and_tiles_stand_for_the_same_numbers(
    kind: str, rows: int, columns: int, name: str, seed: int, apart: int, cut: tuple[int, int]
) -> None:
    """To the bit; some of the rows too, and rows of these."""
    w = random_blocks(kind, rows, columns, torch.Generator().manual_seed(seed), apart=apart)
    truth = meaning(w)
    first, last = sorted(min(at, rows) for at in cut)
    wanted = torch.tensor([rows - 1, 0, rows // 2])
    with core.using(name):
        tiles = TileWeight.of(w)
        for weight in (w, tiles):
            assert torch.equal(weight.dequantize(), truth)
            assert torch.equal(weight.gather(wanted), truth[wanted])
            some = weight.rows(first, last)
            assert some.shape == (last - first, w.shape[1])
            assert torch.equal(some.dequantize(), truth[first:last])
            assert torch.equal(some.rows(1, 3).dequantize(), truth[first:last][1:3])
    assert tiles.tensors()[0].nbytes <= _tile_bytes_at_most(kind, rows, w.blocks.shape[1], w.shape[1])


def _tile_bytes_at_most(kind: str, rows: int, row_bytes: int, columns: int) -> int:
    """The file's bytes, once rows are a multiple of 16; a tile's numbers are padded to 64 bytes."""
    return -(-rows // 16) * (16 * row_bytes + 64)


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_same_bytes_from_every_instruction_set_and_number_of_threads(kind: str) -> None:
    w = random_blocks(kind, 70, 600, torch.Generator().manual_seed(1))
    said = []
    threads = torch.get_num_threads()
    try:
        for name in SETS:
            for number in (1, 3):
                torch.set_num_threads(number)
                with core.using(name):
                    said.append(TileWeight.of(w).tiles)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(tiles, said[0]) for tiles in said)


@pytest.mark.parametrize("index", [[-1], [9], [0, 100]])
def test_rows_that_are_not_there(index: list[int]) -> None:
    w = random_blocks("Q4_K", 9, 256, torch.Generator().manual_seed(1))
    for weight in (w, TileWeight.of(w)):
        with pytest.raises(IndexError, match="of a matrix with 9"):
            weight.gather(torch.tensor(index))


def test_blocks_are_read_and_not_multiplied_by() -> None:
    w = random_blocks("Q8_0", 9, 64, torch.Generator().manual_seed(1))
    assert native_matrix([w], None) is None
    assert native_matrix([TileWeight.of(w)], None) is not None
