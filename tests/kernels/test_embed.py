"""The gather that shows prompt rows, and the index-add of their gradient in a fixed order."""

import pytest
import torch
from embedgrad.kernels import launch
from embedgrad.kernels.embed import embed, embed_backward
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .harness import (
    DEVICE,
    FLOAT_TYPES,
    Layout,
    awkward_sizes,
    check_canaries,
    equal_bits,
    guarded,
    guarded_copy,
    laid_out,
    layouts,
    normal,
    same_bits,
    strides_of,
    three_way,
)

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**31)


def places(seed: int, tokens: int, k: int) -> Tensor:
    """A prompt row or −1 per token: in no order, some rows often, some never."""
    return torch.randint(-1, k, (tokens,), generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE)


@QUICK
@given(
    SEEDS, st.integers(0, 12), awkward_sizes(1, 6), awkward_sizes(1, 40), st.sampled_from(FLOAT_TYPES), layouts(),
    layouts(expanded=False),
)  # fmt: skip
def test_embed(
    seed: int, tokens: int, k: int, width: int, dtype: torch.dtype, layout: Layout, out_layout: Layout
) -> None:
    rows, table = guarded_copy(normal(seed, (k, width))), laid_out(normal(seed + 1, (9, width), dtype), layout)
    shown, ids = places(seed, tokens, k), places(seed + 1, tokens, 9).clamp_min(0)
    # ids are not read where a prompt row is shown: this one lies far outside the table
    ids[shown >= 0] = 2**40

    def run() -> Tensor:
        out = guarded((tokens, width), dtype, strides=strides_of((tokens, width), out_layout))
        with launch.overridden("embed", BLOCK=16):
            return embed(rows, table, ids, shown, out=out)

    out = same_bits(run)
    expected = [rows[r].to(dtype) if r >= 0 else table[i] for r, i in zip(shown.tolist(), ids.tolist(), strict=True)]
    assert not tokens or equal_bits(out, torch.stack(expected))
    check_canaries()


@QUICK
@given(
    SEEDS, st.integers(0, 40), awkward_sizes(1, 6), awkward_sizes(1, 40), st.sampled_from(FLOAT_TYPES), layouts(),
    st.sampled_from([torch.int64, torch.int32]),
)  # fmt: skip
@example(0, 40, 1, 3, torch.float16, "expanded", torch.int64)
def test_embed_backward(
    seed: int, tokens: int, k: int, width: int, dtype: torch.dtype, layout: Layout, index: torch.dtype
) -> None:
    dx = laid_out(normal(seed, (tokens, width), dtype), layout)
    shown = places(seed, tokens, k).to(index)

    def run() -> Tensor:
        with launch.overridden("embed_backward", BLOCK=16):
            return embed_backward(dx, shown, grad=guarded((k, width)))

    grad = same_bits(run)
    truth, inorder = torch.zeros(k, width, dtype=torch.float64, device=DEVICE), torch.zeros(k, width, device=DEVICE)
    for t, r in enumerate(shown.tolist()):
        if r >= 0:
            truth[r] += dx[t].double()
            inorder[r] += dx[t].float()
    # the order of the sum is the order of the text, so plain summation in that order has the same bits
    assert torch.equal(grad, inorder)
    three_way(grad, inorder, truth)
    check_canaries()


def test_a_row_that_is_never_shown_gets_zero() -> None:
    grad = embed_backward(normal(0, (3, 5)), torch.tensor([2, -1, 2], device=DEVICE), grad=guarded((4, 5)))
    assert not grad[[0, 1, 3]].any()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="kept in float32"):
        embed_backward(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), grad=torch.zeros(1, 3).half())
    with pytest.raises(ValueError, match="prompt_rows has shape"):
        embed_backward(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), grad=torch.zeros(1, 3))
