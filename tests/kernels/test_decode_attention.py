"""Decode attention against the definition in fp64, sequence by sequence: drawn lengths, layouts, splits and windows.

Faults that were planted in the kernels; each makes `compare` fail at every run of test_planted_faults:

    keys beyond own_lengths read; the prefix's tail not masked; window dropped; scale of the exponent; a part left out
    of the merge; a part's weight left out of the sum of l; parts without a visible key read (NaN).
"""

import inspect
import re

import pytest
import torch
from embedgrad.kernels import decode_attention as module
from embedgrad.kernels import launch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .harness import (
    DEVICE,
    FLOAT_TYPES,
    INTERPRETED,
    awkward_sizes,
    check_canaries,
    guarded,
    laid_out,
    layouts,
    normal,
    same_bits,
    three_way,
)
from .trees import dense, loaded_from, quick_device_functions

Heads = tuple[int, int, int]  # H, G, D
HEADS: tuple[Heads, ...] = ((1, 1, 16), (3, 1, 20), (4, 2, 32), (2, 2, 8))
SMALL = {"BLOCK_Q": 16, "BLOCK_K": 16, "PROGRAMS": 12}


def attend(
    q: Tensor, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], lengths: list[int], scale: float,
    softcap: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """The definition: every sequence's keys put together, those outside the window cut off."""
    rows = []
    for b, length in enumerate(lengths):
        k, v = (torch.cat((x, y[b, :length])) for x, y in zip(prefix, own, strict=True))
        cut = max(len(k) - window, 0) if window is not None else 0
        visible = torch.ones(1, len(k) - cut, dtype=torch.bool, device=q.device)
        rows.append(dense(q[b : b + 1], k[cut:], v[cut:], visible, scale, softcap)[0])
    return torch.cat(rows)


def compare(
    lengths: list[int], prefix_keys: int, capacity: int, heads: Heads, dtype: torch.dtype, layout: str = "contiguous",
    softcap: float | None = None, window: int | None = None, seed: int = 0, size: float = 1.0, bits: bool = False,
) -> Tensor:  # fmt: skip
    (h, g, d), batch, scale = heads, len(lengths), heads[2] ** -0.5
    q = laid_out(normal(seed, (batch, h, d), dtype, size), layout, name="q")
    prefix = [normal(seed + i, (prefix_keys, g, d), dtype) for i in (1, 2)]
    prefix = [laid_out(x, layout if prefix_keys else "contiguous", name="prefix") for x in prefix]
    own = [normal(seed + i, (batch, capacity, g, d), dtype) for i in (3, 4)]
    own = [laid_out(x, layout if capacity and layout != "expanded" else "contiguous", name="own") for x in own]
    for x in own:  # nobody may read what stands behind a sequence's length
        for b, length in enumerate(lengths):
            x[b, length:] = float("nan")
    on_device = torch.tensor(lengths, device=DEVICE, dtype=torch.int32 if seed % 2 else torch.int64)

    first = (on_device + prefix_keys - window).clamp(min=0) if window is not None else None

    def run() -> Tensor:
        out = guarded(q.shape, dtype, name="out")
        space = guarded((module.workspace_size(q, prefix[0], own[0]),), name="workspace")
        module.decode_attention(
            q, *prefix, *own, on_device, scale=scale, softcap=softcap, first_seen=first, out=out, workspace=space
        )
        return out

    with quick_device_functions(), launch.overridden("decode_attention", **SMALL):
        out = same_bits(run) if bits else run()
    wide = [tuple(x.double() for x in pair) for pair in (prefix, own)]
    truth = attend(q.double(), *wide, lengths, scale, softcap, window)
    plain = attend(q, tuple(prefix), tuple(own), lengths, scale, softcap, window)
    three_way(out, plain, truth, factor=2.0, what="out")
    check_canaries()
    return out


@settings(max_examples=20, deadline=None)
@given(
    st.lists(awkward_sizes(1, 30), min_size=1, max_size=6), awkward_sizes(1, 50), st.integers(0, 9),
    st.sampled_from(HEADS), st.sampled_from(FLOAT_TYPES), layouts(), st.sampled_from((None, None, 3.0)),
    st.sampled_from((None, None, 1, 20)), st.integers(0, 2**31),
)  # fmt: skip
@example([1], 1, 0, (1, 1, 16), torch.float32, "contiguous", None, None, 0)
@example([30, 1, 17, 16], 33, 3, (3, 1, 20), torch.float16, "wide_rows", 3.0, 20, 1)
def test_drawn_lengths(
    lengths: list[int], prefix: int, spare: int, heads: Heads, dtype: torch.dtype, layout: str,
    softcap: float | None, window: int | None, seed: int,
) -> None:  # fmt: skip
    compare(lengths, prefix, max(lengths) + spare, heads, dtype, layout, softcap, window, seed)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9), awkward_sizes(1, 90), st.integers(0, 30),
    st.sampled_from(HEADS), st.sampled_from(FLOAT_TYPES), layouts(), st.sampled_from((None, 3.0)),
    st.sampled_from((None, 5, 33)), st.integers(0, 2**31),
)  # fmt: skip
def test_many_drawn_lengths(
    lengths: list[int], prefix: int, spare: int, heads: Heads, dtype: torch.dtype, layout: str,
    softcap: float | None, window: int | None, seed: int,
) -> None:  # fmt: skip
    compare(lengths, prefix, max(lengths) + spare, heads, dtype, layout, softcap, window, seed, bits=True)


def test_same_bits_in_every_order() -> None:
    compare([0, 5, 19], 37, 24, (4, 2, 32), torch.float32, bits=True)


def test_no_own_keys_and_no_prefix() -> None:
    """Empty sequences, capacity 0, no prefix; a sequence without any key gives 0."""
    compare([0, 0, 7], 20, 9, (2, 1, 16), torch.float32)
    compare([0, 0], 20, 0, (2, 1, 16), torch.float32)
    compare([3, 9], 0, 9, (2, 1, 16), torch.float32)
    assert (compare([0, 4], 0, 4, (2, 1, 16), torch.float32)[0] == 0).all()
    assert (compare([0], 0, 0, (2, 1, 16), torch.float32) == 0).all()


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_logits(size: float) -> None:
    compare([3, 20], 40, 20, (2, 1, 16), torch.float32, size=size)


def test_many_sequences_share_one_read_of_the_prefix() -> None:
    """Each program of the prefix's launch has BLOCK_Q rows, whatever sequences they are of."""
    compare([1] * 40, 20, 1, (2, 1, 16), torch.float32)


def test_splits_follow_from_capacities() -> None:
    """The launch is the same whatever the lengths are, so that a captured graph stays valid."""
    q, prefix, own = torch.empty(3, 4, 16), torch.empty(100, 2, 16), torch.empty(3, 50, 2, 16)
    sizes = {module.workspace_size(q, prefix, own, {**SMALL, "PROGRAMS": n}) for n in (1, 2)}
    assert sizes == {2 * 3 * 4 * 18}
    assert module.workspace_size(q, prefix, own, {**SMALL, "PROGRAMS": 10**6}) == (7 + 4) * 3 * 4 * 18


def test_refusals() -> None:
    q, prefix, own = torch.zeros(3, 4, 16), torch.zeros(5, 2, 16), torch.zeros(3, 6, 2, 16)
    lengths, good = torch.zeros(3, dtype=torch.int32), {"scale": 1.0, "out": torch.zeros(3, 4, 16)}
    with pytest.raises(ValueError, match="own_k is"):
        module.decode_attention(q, prefix, prefix, own[:2], own[:2], lengths, **good)
    with pytest.raises(ValueError, match="own_lengths"):
        module.decode_attention(q, prefix, prefix, own, own, lengths.float(), **good)
    with pytest.raises(ValueError, match="workspace"):
        module.decode_attention(q, prefix, prefix, own, own, lengths, **good, workspace=torch.zeros(1))
    with pytest.raises(ValueError, match="different types"):
        module.decode_attention(q, prefix, prefix, own.half(), own.half(), lengths, **good)


FAULTS = {
    "keys beyond own_lengths": (r"tl\.minimum\(start \+ keys_per_split, length\)", "start + keys_per_split"),
    "tail of the prefix not masked": (r"m_seen = m_k\[None, :\]\n", "m_seen = m_k[None, :] | True\n"),
    "window dropped": (r"m_seen & \(i_s \+ o_j\[None, :\] >= b_first\[:, None\]\)", "m_seen"),
    "last part left out": (r"m_p = i_p \+ o_p < num_parts", "m_p = i_p + o_p < num_parts - 1"),
    "weight of l": (r"b_l \* b_w", "b_l"),
    "empty parts read": (r"m_o = \(m_p & \(b_l > 0\.0\)\)\[:, None\]", "m_o = m_p[:, None]"),
}


@pytest.mark.skipif(not INTERPRETED, reason="plants faults in sources, for the interpreter")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the module with one fault must fail the comparison that the module itself passes."""
    source, count = re.subn(*FAULTS[fault], inspect.getsource(module))
    assert count, f"the fault {fault!r} no longer applies"
    window = 20 if "window" in fault else None
    case = ([0, 5, 17], 37, 20, (2, 1, 16), torch.float32)
    compare(*case, window=window)
    monkeypatch.setattr(module, "decode_attention", loaded_from(module, source).decode_attention)
    with pytest.raises(AssertionError):
        compare(*case, window=window)
