"""Tree attention against the dense fp64 definition: drawn trees, layouts and types; same bits; canaries; extremes.

Faults: FAULTS lists what is planted into a copy of the kernels at every run (a dropped mask or window, a branch missing
from the prefix's sum, a slot missing from the sum of its pieces, a wrong scale, the pivot −∞, a store beyond the last
row); each must make `compare`, which all drawn trees go through, or its canaries, fail.
"""

import inspect
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from embedgrad.kernels import launch, tree_attention_backward
from embedgrad.kernels import tree_attention as forward_module
from embedgrad.kernels.tree_schedule import TreeSchedule
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .harness import (
    DEVICE,
    FLOAT_TYPES,
    INTERPRETED,
    TOLERANCE,
    check_canaries,
    guarded,
    laid_out,
    layouts,
    normal,
    same_bits,
    three_way,
)
from .trees import Tree, dense, dense_backward, loaded_from, magnitudes, quick_device_functions, seen, trees

Heads = tuple[int, int, int]  # H, G, D
HEADS: tuple[Heads, ...] = ((1, 1, 16), (3, 1, 20), (4, 2, 32), (2, 2, 8))


@contextmanager
def small_blocks(block_q: int = 16, block_k: int = 16, programs: int = 6) -> Iterator[None]:
    """Several blocks on few tokens, which is what the interpreter has time for."""
    blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k}
    with (
        quick_device_functions(),
        launch.overridden("tree_attention_forward", **blocks),
        launch.overridden("tree_attention_backward_dq", **blocks),
        launch.overridden("tree_attention_backward_dkv", **blocks, PROGRAMS=programs),
    ):
        yield


def forward(
    q: Tensor, k: Tensor, v: Tensor, schedule: TreeSchedule, scale: float, softcap: float | None
) -> list[Tensor]:
    out, lse = guarded(q.shape, q.dtype, name="out"), guarded(q.shape[:2], name="lse")
    forward_module.tree_attention(q, k, v, schedule, scale=scale, softcap=softcap, out=out, lse=lse)
    return [out, lse]


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, schedule: TreeSchedule,
    scale: float, softcap: float | None, wanted: str = "qkv",
) -> list[Tensor]:  # fmt: skip
    own = (len(k) - schedule.prefix, *k.shape[1:])
    found = [
        guarded(shape, q.dtype, name=f"d{n}") for n, shape in (("q", q.shape), ("k", own), ("v", own)) if n in wanted
    ]
    names = [n for n in "qkv" if n in wanted]
    given_ = {f"d{n}": x for n, x in zip(names, found, strict=True)}
    tree_attention_backward.tree_attention_backward(
        do, q, k, v, o, lse, schedule, scale=scale, softcap=softcap, **given_
    )
    return found


def compare(
    tree: Tree, heads: Heads, dtype: torch.dtype, layout: str, softcap: float | None, seed: int,
    size: float = 1.0, bits: bool = False,
) -> None:  # fmt: skip
    """The kernels on one tree against fp64 and against plain torch in the kernels' own type."""
    (h, g, d), schedule = heads, tree.schedule()
    n, s, scale = len(schedule.query_index), len(schedule.key_begin), d**-0.5
    q = laid_out(normal(seed, (n, h, d), dtype, size), layout if n else "contiguous", name="q")
    k, v = (laid_out(normal(seed + i, (s, g, d), dtype), layout, name="kv"[i - 1]) for i in (1, 2))
    do = laid_out(normal(seed + 3, (n, h, d), dtype), layout if n else "contiguous", name="do")
    visible = seen(schedule)

    truth = dense(q.double(), k.double(), v.double(), visible, scale, softcap)
    plain = dense(q, k, v, visible, scale, softcap)
    found = (same_bits if bits else lambda run: run())(lambda: forward(q, k, v, schedule, scale, softcap))
    for what, a, b, c in zip(("o", "lse"), found, plain, truth, strict=True):
        three_way(a, b, c, factor=2.0, what=what)

    truths = dense_backward(do.double(), q.double(), k.double(), v.double(), visible, scale, softcap)
    plains = dense_backward(do, q, k, v, visible, scale, softcap)

    def run() -> list[Tensor]:
        return backward(do, q, k, v, found[0], found[1], schedule, scale, softcap)

    gradients = (same_bits if bits else lambda run: run())(run)
    # P = exp(s − lse) is rebuilt from numbers rounded relative to themselves, so large logits cost relative precision
    # of P: 8 units in the last place (TOLERANCE of fp32) hold for |lse| up to 8.
    largest = truth[1][truth[1] > float("-inf")].abs().amax().item() if visible.any() else 0.0
    precision = max(TOLERANCE[dtype], TOLERANCE[torch.float32] * max(1.0, largest / 8))
    sizes = magnitudes(do.double(), q.double(), k.double(), v.double(), visible, scale, softcap)
    for what, a, b, c, e in zip(("dq", "dk", "dv"), gradients, plains, truths, sizes, strict=True):
        rows = slice(None) if what == "dq" else slice(schedule.prefix, None)
        noise = precision * e[rows].norm()
        if float(c[rows].norm()) > 10 * noise:
            three_way(a, b[rows], c[rows], factor=2.0, tolerance=float(noise / c[rows].norm()), what=what)
        else:
            assert float((a.double() - c[rows]).norm()) <= 10 * noise, what
    check_canaries()


GIANT_PREFIX = Tree("prefix", ((-1, 33), (0, 3), (0, 0), (0, 5)), (), 1, None)
MANY_LEAVES = Tree("leaves", ((-1, 5), *((0, 2),) * 14), ((0, 40), (7, 9), (3, 3)), 1, None)
DEEP = Tree("deep", tuple((i - 1, 3) for i in range(13)), ((0, 39),), 3, 7)


@settings(max_examples=12, deadline=None)
@given(
    trees(), st.sampled_from(HEADS), st.sampled_from(FLOAT_TYPES), layouts(), st.sampled_from((None, None, 3.0)),
    st.integers(0, 2**31),
)  # fmt: skip
@example(GIANT_PREFIX, (2, 1, 20), torch.float32, "contiguous", None, 0)
@example(MANY_LEAVES, (4, 2, 32), torch.float16, "wide_rows", None, 1)
@example(DEEP, (1, 1, 16), torch.float32, "transposed", 3.0, 2)
@example(Tree("one token", ((-1, 1),), (), 1, None), (1, 1, 16), torch.float32, "stepped", None, 3)
def test_drawn_trees(
    tree: Tree, heads: Heads, dtype: torch.dtype, layout: str, softcap: float | None, seed: int
) -> None:
    with small_blocks():
        compare(tree, heads, dtype, layout, softcap, seed)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    trees(), st.sampled_from(HEADS), st.sampled_from(FLOAT_TYPES), layouts(), st.sampled_from((None, 3.0)),
    st.integers(0, 2**31), st.sampled_from(((16, 32), (32, 16), (16, 16))),
)  # fmt: skip
def test_many_drawn_trees(
    tree: Tree, heads: Heads, dtype: torch.dtype, layout: str, softcap: float | None, seed: int, blocks: tuple[int, int]
) -> None:
    with small_blocks(*blocks):
        compare(tree, heads, dtype, layout, softcap, seed, bits=True)


@pytest.mark.parametrize("tree", [GIANT_PREFIX, DEEP], ids=lambda tree: tree.name)
def test_same_bits_in_every_order(tree: Tree) -> None:
    with small_blocks():
        compare(tree, (2, 1, 20), torch.float32, "contiguous", None, 7, bits=True)


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_prefix_pieces(programs: int) -> None:
    """However finely the rows behind a prefix are cut into pieces, the gradient is the same, and nothing is lost."""
    with small_blocks(programs=programs):
        compare(GIANT_PREFIX, (2, 1, 16), torch.float32, "contiguous", None, 11)


@pytest.mark.parametrize("dim", [80, 256])
def test_head_dimensions(dim: int) -> None:
    """Padded with masked columns (80), and the widest."""
    with small_blocks():
        compare(Tree("random", ((-1, 9), (0, 5), (0, 4)), ((0, 18),), 1, None), (2, 1, dim), torch.float32,
                "wide_rows", None, 13)  # fmt: skip


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_logits(size: float) -> None:
    with small_blocks():
        compare(MANY_LEAVES, (2, 1, 16), torch.float32, "contiguous", None, 17, size=size)


def test_rows_without_a_key() -> None:
    """Queries before every prefix key's interval that have no key of their own: o = 0, lse = −∞, gradients 0."""
    n, h, d = 20, 2, 16
    schedule = TreeSchedule(*(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([5, 9], [7, 9], range(n))), 0)
    q, do = normal(1, (n, h, d)), normal(4, (n, h, d))
    k, v = (laid_out(normal(i, (2, 1, d)), "contiguous") for i in (2, 3))
    with small_blocks():
        out, lse = forward(q, k, v, schedule, 0.25, None)
        dq, dk, dv = backward(do, q, k, v, out, lse, schedule, 0.25, None)
    blind = [i for i in range(n) if i not in (5, 6)]
    assert (out[blind] == 0).all()
    assert (lse[blind] == float("-inf")).all()
    assert (dq[blind] == 0).all()
    assert torch.equal(out[5:7], v[:1].expand(2, h, d))
    assert (dk[1] == 0).all()
    assert (dv[1] == 0).all()
    torch.testing.assert_close(dv[0, 0], do[5:7].sum((0, 1)))


def test_no_queries_and_no_keys() -> None:
    empty = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    k = normal(1, (3, 1, 16))
    interval = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    schedule = TreeSchedule(interval, interval + 1, empty, 0)
    nothing = guarded((0, 2, 16))
    out, lse = forward(nothing, k, k, schedule, 1.0, None)
    dk, dv = backward(nothing, nothing, k, k, out, lse, schedule, 1.0, None, "kv")
    assert (dk == 0).all()
    assert (dv == 0).all()
    q, none = normal(2, (5, 2, 16)), normal(3, (0, 1, 16))
    schedule = TreeSchedule(empty, empty, torch.arange(5, dtype=torch.int32, device=DEVICE), 0)
    out, lse = forward(q, none, none, schedule, 1.0, None)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    dq, dk, dv = backward(q, q, none, none, out, lse, schedule, 1.0, None)
    assert (dq == 0).all()
    assert dk.numel() == dv.numel() == 0


@pytest.mark.parametrize("wanted", ["q", "kv"])
def test_only_what_is_wanted(wanted: str) -> None:
    schedule = GIANT_PREFIX.schedule()
    n = GIANT_PREFIX.tokens
    q, k, v, do = (normal(i, (n, 1, 16)) for i in range(4))
    with small_blocks():
        out, lse = forward(q, k, v, schedule, 0.25, None)
        every = dict(zip("qkv", backward(do, q, k, v, out, lse, schedule, 0.25, None), strict=True))
        found = backward(do, q, k, v, out, lse, schedule, 0.25, None, wanted)
    for name, x in zip(wanted, found, strict=True):
        assert torch.equal(x, every[name])


def test_views_of_one_buffer() -> None:
    """q, k, v are views of one QKV buffer; dq, dk, dv of another, whose other columns stay as they are."""
    h, g, d, tree = 2, 1, 16, MANY_LEAVES
    schedule = Tree(tree.name, tree.segments, (), 1, None).schedule()
    n = tree.tokens
    qkv = normal(5, (n, (h + 2 * g + 1) * d))
    gradient = guarded((n, (h + 2 * g + 1) * d), fill=7.0)

    def parts(x: Tensor) -> list[Tensor]:
        at = (0, h, h + g, h + 2 * g)
        return [x[:, a * d : b * d].view(n, b - a, d) for a, b in itertools.pairwise(at)]

    (q, k, v), do = parts(qkv), normal(6, (1, 1, d)).expand(n, h, d)
    with small_blocks():
        out, lse = forward(q, k, v, schedule, 0.25, None)
        dq, dk, dv = parts(gradient)
        tree_attention_backward.tree_attention_backward(
            do, q, k, v, out, lse, schedule, scale=0.25, dq=dq, dk=dk, dv=dv
        )
    truth = dense_backward(*(x.double() for x in (do, q, k, v)), seen(schedule), 0.25)
    for found, expected in zip((dq, dk, dv), truth, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert (gradient[:, (h + 2 * g) * d :] == 7.0).all()


def test_parts_add_up() -> None:
    """Gradients of some keys, or of some queries, are those of a launch that has only these (the docstring says so)."""
    schedule, n = MANY_LEAVES.schedule(), MANY_LEAVES.tokens
    prefix = schedule.prefix
    q, do = normal(1, (n, 2, 16)), normal(2, (n, 2, 16))
    k, v = normal(3, (prefix + n, 1, 16)), normal(4, (prefix + n, 1, 16))
    few = slice(prefix + 3, prefix + 8)
    rows = torch.tensor([1, 5, 30], device=DEVICE)
    with small_blocks():
        out, lse = forward(q, k, v, schedule, 0.25, None)
        dq, dk, dv = backward(do, q, k, v, out, lse, schedule, 0.25, None)
        keys = TreeSchedule(schedule.key_begin[few], schedule.key_end[few], schedule.query_index, 0)
        some_dk, some_dv = backward(do, q, k[few], v[few], out, lse, keys, 0.25, None, "kv")
        queries = TreeSchedule(schedule.key_begin, schedule.key_end, schedule.query_index[rows], prefix)
        (some_dq,) = backward(do[rows], q[rows], k, v, out[rows], lse[rows], queries, 0.25, None, "q")
    torch.testing.assert_close(some_dk, dk[3:8])
    torch.testing.assert_close(some_dv, dv[3:8])
    torch.testing.assert_close(some_dq, dq[rows])


def test_skips_what_nobody_sees() -> None:
    """Every visited block of keys has a key that a query of the program can see, and pieces are of fair length."""
    for tree in (GIANT_PREFIX, MANY_LEAVES, DEEP):
        schedule = Tree(tree.name, tree.segments, (), 1, None).schedule()
        visible = seen(schedule).repeat_interleave(2, 0)
        lists = schedule.key_lists(2, 16, 16)
        for b, (whole, partial) in enumerate(lists.counts.tolist()):
            for i, key_block in enumerate(lists.order[b].tolist()):
                tile = visible[16 * b : 16 * b + 16, 16 * key_block : 16 * key_block + 16]
                assert tile.any() == (i < whole + partial)
                assert not (i < whole and not tile.all())
        pieces = schedule.query_pieces(2, 16, 16, 4)
        covered = torch.zeros_like(visible)
        for block, begin, end, *_ in pieces.pieces.tolist():
            if block >= 0:
                covered[begin:end, 16 * block : 16 * block + 16] = True
        assert (covered | ~visible).all()
        assert (pieces.pieces[:, 0] >= 0).sum() <= len(pieces.blocks) + 4
        assert int(pieces.blocks[:, 1].sum()) <= pieces.slots


def test_refusals() -> None:
    schedule, n = GIANT_PREFIX.schedule(), GIANT_PREFIX.tokens
    q = normal(1, (n, 2, 16))
    good = {"out": torch.empty_like(q), "lse": torch.empty(n, 2, device=DEVICE)}
    with pytest.raises(ValueError, match="fit together"):
        forward_module.tree_attention(q, q[:, :1, :8], q[:, :1, :8], schedule, scale=1.0, **good)
    with pytest.raises(ValueError, match="different types"):
        forward_module.tree_attention(q, q.half(), q.half(), schedule, scale=1.0, **good)
    with pytest.raises(ValueError, match="the mask is for"):
        forward_module.tree_attention(q[1:], q, q, schedule, scale=1.0, out=good["out"][1:], lse=good["lse"][1:])
    with pytest.raises(ValueError, match="positive"):
        forward_module.tree_attention(q, q, q, schedule, scale=0.0, **good)
    with pytest.raises(ValueError, match="both or neither"):
        tree_attention_backward.tree_attention_backward(
            q, q, q, q, q, good["lse"], schedule, scale=1.0, dk=torch.empty_like(q)
        )
    with pytest.raises(ValueError, match="workspace"):
        tree_attention_backward.tree_attention_backward(
            q, q, q, q, q, good["lse"], schedule, scale=1.0, dq=torch.empty_like(q), workspace=torch.empty(3)
        )
    with pytest.raises(ValueError, match="int32"):
        TreeSchedule(schedule.key_begin.long(), schedule.key_end, schedule.query_index)
    with pytest.raises(ValueError, match="window"):
        TreeSchedule(schedule.key_begin, schedule.key_end, schedule.query_index, window=3)


BACKWARD = tree_attention_backward
FAULTS = {
    "forward: mask dropped": (forward_module, r"tl\.where\(m_seen, b_s, float\(\"-inf\"\)\)", "b_s"),
    "forward: window dropped": (forward_module, r"    if WINDOW:\n        m_seen = .*\n", ""),
    "forward: scale of the exponent": (forward_module, r"b_s \* to_base_2 - b_pivot", "b_s * LOG2E - b_pivot"),
    "forward: a block of keys left out": (forward_module, r"range\(n_whole, n_whole", "range(n_whole + 1, n_whole"),
    "forward: pivot −∞": (forward_module, r"tl\.where\(b_new == float\(\"-inf\"\), 0\.0, b_new\) if MASKED else ", ""),
    "forward: rows after the last stored": (
        forward_module,
        r"m_o = m_r\[:, None\] & ",
        "m_o = (o_r < num_queries * GROUP + 2)[:, None] & ",
    ),
    "backward: mask dropped": (BACKWARD, r"tl\.where\(m_seen, b_p, 0\.0\)", "b_p"),
    "backward: scale of dq": (BACKWARD, r"\(b_dq \* scale\)", "b_dq"),
    "backward: scale of dk": (BACKWARD, r"\(b_dk \* scale\)", "b_dk"),
    "backward: last branch missing from the prefix": (
        BACKWARD,
        r"\(row_end - whole_end,",
        "(row_end - whole_end - BLOCK_Q,",
    ),
    "backward: first slot missing": (BACKWARD, r"\(first \+ i \+ o_s\)", "(first + tl.maximum(i + o_s, 1))"),
    "backward: D left out": (BACKWARD, r"b_dp - b_delta\[", "b_dp - 0.0 * b_delta["),
}


@pytest.mark.skipif(not INTERPRETED, reason="plants faults in sources, for the interpreter")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the module with one fault must fail the comparison that the module itself passes."""
    module, pattern, replacement = FAULTS[fault]
    source, count = re.subn(pattern, replacement, inspect.getsource(module))
    assert count, f"the fault {fault!r} no longer applies: {pattern} is not in the source"
    prefix = ((3, 30),) * 16 if "pivot" in fault else ((0, 30),)
    tree = Tree("prefix", ((-1, 20), (0, 6), (0, 9)), prefix, 1, 4 if "window" in fault else None)
    launcher = module.__name__.rsplit(".", 1)[-1]
    with small_blocks():
        compare(tree, (2, 1, 16), torch.float32, "contiguous", None, 3)
        monkeypatch.setattr(module, launcher, getattr(loaded_from(module, source), launcher))
        with pytest.raises(AssertionError):
            compare(tree, (2, 1, 16), torch.float32, "contiguous", None, 3)
