"""csrc/ against float64 by the three-way rule, on every instruction set of this machine, and the engine on it."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedgrad import backends
from embedgrad.backends.mask import TreeMask
from embedgrad.backends.reference import OPS as reference
from embedgrad.engine.gradient import loss_and_grad
from embedgrad.engine.model import load_model
from embedgrad.model.frozen import FrozenMatrix, Widening
from embedgrad.util.errors import BackendError
from tests.engine.drawn import batches, configs, make_prompt, pair, prompts
from tests.kernels.harness import awkward_sizes, guarded, laid_out, normal, three_way
from tests.kernels.trees import Tree, dense, dense_backward, magnitudes, seen, trees
from tests.model.tiny import write_folder
from tests.truth import relative_error

try:
    from embedgrad.backends import native as core
except ImportError as error:
    pytest.skip(f"csrc/ is not built: {error}", allow_module_level=True)
native = core.OPS

SETS = core.INSTRUCTION_SETS[: core.INSTRUCTION_SETS.index(core.instruction_set()) + 1]
instruction_sets = st.sampled_from(SETS)
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 2**31)


@quick
@given(SEEDS, awkward_sizes(1, 9), awkward_sizes(1, 70), st.sampled_from([1e-3, 1.0, 1e3]), instruction_sets)
def test_norms(seed: int, rows: int, width: int, scale: float, name: str) -> None:
    x, dy = laid_out(normal(seed, (rows, width), scale=scale), "wide_rows"), normal(seed + 1, (rows, width))
    weight = normal(seed + 2, (width,))
    before = normal(seed + 4, (rows, width), scale=1 / scale)
    truth, plainly = {}, {}
    for into, dtype in ((truth, torch.float64), (plainly, torch.float32)):
        a, d, w, b = (t.to(dtype).contiguous() for t in (x, dy, weight, before))
        into["y"] = reference.rms_norm(a, w, 1e-6, out=torch.empty_like(a))
        into["dx"] = reference.rms_norm_backward(d, a, w, 1e-6, dx=b.clone())
    with core.using(name):
        three_way(native.rms_norm(x, weight, 1e-6, out=guarded((rows, width))), plainly["y"], truth["y"])
        dx = native.rms_norm_backward(dy, x, weight, 1e-6, dx=laid_out(before, "wide_rows"))
        terms = (weight.double() * dy.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 1e-6)).norm()
        three_way(dx, plainly["dx"], truth["dx"], tolerance=1e-6 * max(1.0, float(terms / truth["dx"].norm())))


@quick
@given(
    SEEDS, awkward_sizes(1, 5), awkward_sizes(1, 20), st.integers(0, 4), st.integers(0, 3), st.booleans(),
    instruction_sets,
)  # fmt: skip
def test_rope_and_its_transpose(seed: int, rows: int, half: int, h: int, g: int, normed: bool, name: str) -> None:
    heads, width = (h, g, 2 * half), (h + 2 * g) * 2 * half
    qkv, raw = normal(seed, (rows, width)), normal(seed + 2, (rows, width))
    angle = normal(seed + 1, (rows, half), scale=3.0).double()
    norms = [normal(seed + i, (2 * half,)) if normed else None for i in (3, 4)]

    def arguments(dtype: torch.dtype) -> dict[str, Any]:
        q, k = (None if w is None else w.to(dtype) for w in norms)
        return {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype), "heads": heads, "q_norm": q, "k_norm": k,
                "eps": 1e-6}  # fmt: skip

    def truth_and_plain(run: Any) -> tuple[Tensor, Tensor]:
        return tuple(run(qkv.to(d, copy=True), raw.to(d), arguments(d)) for d in (torch.float64, torch.float32))

    with core.using(name):
        truth, plainly = truth_and_plain(lambda x, _, a: reference.rope(x, **a))
        three_way(native.rope(laid_out(qkv, "wide_rows"), **arguments(torch.float32)), plainly, truth)
        truth, plainly = truth_and_plain(lambda x, r, a: reference.rope_backward(x, r, **a))
        found = native.rope_backward(laid_out(qkv, "wide_rows"), raw, **arguments(torch.float32))
        # what cancels in the norm's backward: r·w·dy less its part along x̂, all of it for a head of one number
        terms = (
            10 * float(raw.double().unflatten(1, (-1, 2 * half)).square().mean(-1).rsqrt().amax())
            if normed and width
            else 1
        )
        three_way(found, plainly, truth, tolerance=1e-6 * max(1.0, terms))


@quick
@given(
    SEEDS, awkward_sizes(1, 5), awkward_sizes(1, 70), st.sampled_from([1.0, 30.0, 1e4]), instruction_sets,
    st.booleans(),
)  # fmt: skip
def test_swiglu(seed: int, rows: int, width: int, scale: float, name: str, gelu: bool) -> None:
    gate_up = laid_out(normal(seed, (rows, 2 * width), scale=scale), "wide_rows")
    da = normal(seed + 1, (rows, width))
    wide = gate_up.double()
    with core.using(name):
        ours, backward, theirs, plain = (
            partial(op, gelu=gelu)
            for op in (native.swiglu, native.swiglu_backward, reference.swiglu, reference.swiglu_backward)
        )
        three_way(
            ours(gate_up, out=guarded((rows, width))),
            theirs(gate_up, out=torch.empty(rows, width)),
            theirs(wide, out=torch.empty(rows, width, dtype=torch.float64)),
        )
        truth = plain(da.double(), wide, out=torch.empty_like(wide))
        plainly = plain(da, gate_up, out=torch.empty(rows, 2 * width))
        three_way(backward(da, gate_up, out=guarded((rows, 2 * width))), plainly, truth)
        three_way(backward(da, gate_up, out=gate_up), plainly, truth)


@quick
@given(
    SEEDS, awkward_sizes(1, 9), awkward_sizes(1, 8), awkward_sizes(1, 2100), st.sampled_from([0.1, 3.0, 1e3]),
    st.sampled_from([1, 3, 10**9]), st.booleans(), st.sampled_from([None, None, 0.5, 30.0]), instruction_sets,
)  # fmt: skip
def test_linear_cross_entropy(
    seed: int, count: int, width: int, vocabulary: int, scale: float, rows: int, differentiate: bool,
    softcap: float | None, name: str,
) -> None:  # fmt: skip
    """In any number of pieces, with ignored targets, weights of 0, and tied logits; float64 says what is right."""
    h, w = normal(seed, (count, width), scale=scale), normal(seed + 1, (vocabulary, width))
    w[vocabulary // 2] = w[0]
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1, vocabulary, (count,), generator=draw)
    weights = torch.rand(count, generator=draw) * torch.randint(0, 2, (count,), generator=draw)
    dh = guarded((count, width)) if differentiate else None
    head = FrozenMatrix([w], None, Widening(torch.float32, torch.device("cpu")))
    with core.using(name):
        nll, predicted = native.linear_cross_entropy(
            h, head, targets, weights, softcap=softcap, dh=dh, logit_bytes=rows * vocabulary * 4
        )
    wide = h.double().requires_grad_()
    raw = wide @ w.double().T
    logits = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    every = torch.nn.functional.cross_entropy(logits, targets.clamp_min(0), reduction="none")
    every, logits = torch.where(targets >= 0, every, 0), logits.detach()
    error = 4e-7 * (1 + logits.abs().amax(dim=1)) * width**0.5
    assert bool(((nll - every).abs() <= error).all())
    chosen = logits.gather(1, predicted[:, None]).squeeze(1)
    assert bool((logits.amax(dim=1) - chosen <= error).all())
    if dh is not None:
        (every * weights).sum().backward()
        plain = torch.empty(count, width)
        reference.linear_cross_entropy(h, head, targets, weights, softcap=softcap, dh=plain)
        three_way(dh, plain, wide.grad, tolerance=2e-6 * (1 + float(raw.detach().abs().max())))


@pytest.mark.parametrize("name", SETS)
def test_the_softcaps_tanh(name: str) -> None:
    """With one key, lse is the capped score itself."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-9, 3, 999), -torch.logspace(-9, 3, 999)])
    q, one = torch.zeros(len(x), 1, 8), torch.ones(1, 1, 8)
    q[:, 0, 0] = x
    mask = TreeMask(
        torch.zeros(1, dtype=torch.int32), torch.full((1,), len(x), dtype=torch.int32),
        torch.arange(len(x), dtype=torch.int32), 0, None, None, None,
    )  # fmt: skip
    with core.using(name):
        _, lse = native.tree_attention(
            q, one, one, mask, scale=1.0, softcap=1.0, out=torch.empty(len(x), 1, 8), lse=torch.empty(len(x), 1)
        )
    truth = torch.tanh(x.double())
    assert float(((lse[:, 0].double() - truth) / truth.abs()).abs().max()) < 2 * 2**-23


def test_loss_of_logits_that_are_no_distribution() -> None:
    z = torch.tensor([[0.0, float("nan"), 1.0], [0.0, float("inf"), 1.0], [-float("inf"), 0.0, -float("inf")]])
    nll, predicted = torch.empty(3), torch.empty(3, dtype=torch.int64)
    torch.ops.embedgrad.softmax_loss(z, torch.tensor([2, 2, 1]), None, 0.0, nll, predicted)
    assert bool(nll[:2].isnan().all())
    assert nll[2] == 0
    assert predicted[2] == 1
    with pytest.raises(IndexError, match="target 3 of row 1 is not below 3"):
        torch.ops.embedgrad.softmax_loss(z, torch.tensor([2, 3, 1]), None, 0.0, nll, predicted)


def _mask(tree: Tree) -> TreeMask:
    s = tree.schedule()
    positions = (None, None) if s.window is None else (s.query_position, s.key_position)
    return TreeMask(s.key_begin, s.key_end, s.query_index, s.prefix, s.window, *positions)


def _close(found: Tensor, truth: Tensor, magnitude: Tensor, tolerance: float) -> None:
    assert not found.isnan().any()
    assert float((found.double() - truth).norm()) <= tolerance * float(magnitude.norm())


@quick
@given(
    SEEDS, trees(), st.sampled_from([(1, 1, 8), (6, 2, 16), (9, 3, 24), (4, 4, 33)]), st.sampled_from([1.0, 30.0]),
    st.sampled_from(["both", "dq", "dkv"]), st.sampled_from([None, 0.7, 50.0]), instruction_sets,
)  # fmt: skip
def test_tree_attention(
    seed: int, tree: Tree, heads: tuple[int, int, int], scale: float, wanted: str, softcap: float | None, name: str
) -> None:
    h, g, size = heads
    mask, visible = _mask(tree), seen(tree.schedule())
    queries, keys = len(mask.query_index), len(mask.key_begin)
    fused = laid_out(normal(seed, (queries, h * size), scale=scale), "wide_rows")
    q = fused.unflatten(1, (h, size))
    k, v, do = (normal(seed + i, (n, m, size)) for i, (n, m) in enumerate(((keys, g), (keys, g), (queries, h)), 1))
    wide = [x.double() for x in (q, k, v)]
    out, lse = dense(*wide, visible, size**-0.5, softcap)
    with core.using(name):
        o, l = native.tree_attention(
            q, k, v, mask, scale=size**-0.5, softcap=softcap, out=guarded((queries, h, size)), lse=guarded((queries, h))
        )
    _close(o, out, v, 2e-6)
    assert torch.equal(l == float("-inf"), lse == float("-inf"))
    finite = lse != float("-inf")
    assert ((l - lse)[finite].abs() <= 1e-5 * (1 + lse[finite].abs())).all()
    dq = None if wanted == "dkv" else guarded((queries, h, size))
    dk, dv = (None, None) if wanted == "dq" else (guarded((keys - mask.prefix, g, size)) for _ in range(2))
    with core.using(name):
        native.tree_attention_backward(do, q, k, v, o, l, mask, scale=size**-0.5, softcap=softcap, dq=dq, dk=dk, dv=dv)
    truth = dense_backward(do.double(), *wide, visible, size**-0.5, softcap)
    sizes = magnitudes(do.double(), *wide, visible, size**-0.5, softcap)
    firsts = (0, mask.prefix, mask.prefix)
    for found, expected, magnitude, first in zip((dq, dk, dv), truth, sizes, firsts, strict=True):
        if found is not None:
            _close(found, expected[first:], magnitude[first:], 5e-6 * max(1.0, scale))


def test_a_prefix_with_many_branches_over_several_threads_gives_the_same_bits() -> None:
    tree = Tree("prefix", ((-1, 50), *((0, 11),) * 20), (), 1, None)
    mask, visible = _mask(tree), seen(tree.schedule())
    n, before = tree.tokens, torch.get_num_threads()
    q, k, v, do = normal(0, (n, 6, 32)), normal(1, (n, 2, 32)), normal(2, (n, 2, 32)), normal(3, (n, 6, 32))
    out, lse = dense(q, k, v, visible, 32**-0.5)
    lse, results = lse.contiguous(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            grads = [torch.empty_like(x) for x in (q, k, v)]
            native.tree_attention_backward(
                do, q, k, v, out, lse, mask, scale=32**-0.5, dq=grads[0], dk=grads[1], dv=grads[2]
            )
            results.append(grads)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))
    for grads in results:
        for a, b in zip(grads, results[0], strict=True):
            assert relative_error(a, b) < 1e-6


@settings(quick, max_examples=30)
@given(config=configs(), prompt=prompts(), batch=batches())
def test_the_engine_agrees_with_the_reference(config: Any, prompt: Any, batch: list[Any]) -> None:
    model = pair(*config).model
    assert model.backend == "native"
    p = make_prompt(model, prompt)
    loss, grad = loss_and_grad(model, p, batch)
    model.decoder.ops = model.ops = reference
    try:
        expected_loss, expected = loss_and_grad(model, p, batch)
    finally:
        model.decoder.ops = model.ops = native
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative_error(grad, expected) <= 2e-5  # what either may be off by against transformers


OPS = (
    "rms_norm", "rms_norm_backward", "rope", "rope_backward", "swiglu", "swiglu_backward",
    "softmax_loss", "embed", "embed_backward", "prompt_step", "tree_schedule", "tree_attention",
    "tree_attention_backward",
)  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    x, mask = torch.randn(5, 8), _mask(Tree("prefix", ((-1, 5),), (), 1, None))
    heads = [torch.randn(5, 2, 4), torch.randn(5, 1, 4), torch.randn(5, 1, 4)]
    schedule, tables = core._schedule(mask, 2), (torch.randn(5, 2), torch.randn(5, 2))
    shown, out, lse = torch.tensor([-1, 0, 1, 0, -1]), torch.empty(5, 2, 4), torch.zeros(5, 2)
    memory = [torch.empty(f(5, 5, (2, 1, 4)), dtype=torch.uint8) for f in (
        native.tree_attention_bytes, native.tree_attention_backward_bytes)]  # fmt: skip
    arguments: dict[str, tuple[Any, ...]] = {
        "rms_norm": (x, torch.ones(8), 1e-6, torch.empty(5, 8)),
        "rms_norm_backward": (torch.randn(5, 8), x, torch.ones(8), 1e-6, torch.zeros(5, 8)),
        "rope": (x, *tables, 1, 1, 4, torch.ones(4), None, 1e-6),
        "rope_backward": (x, torch.randn(5, 8), *tables, 1, 1, 4, torch.ones(4), None, 1e-6),
        "swiglu": (x, torch.empty(5, 4), False),
        "swiglu_backward": (torch.randn(5, 4), x, torch.empty(5, 8), True),
        "softmax_loss": (x, torch.arange(5), torch.ones(5), 2.0, torch.empty(5), torch.empty(5, dtype=torch.int64)),
        "embed": (torch.randn(2, 8), torch.randn(3, 8), torch.tensor([2, 0, 0, 0, 1]), shown, torch.empty(5, 8)),
        "embed_backward": (x, shown, torch.empty(2, 8)),
        "prompt_step": (
            *(torch.rand(5, 8) for _ in range(5)), [0.1, 0.999, 0.001, 1.0, 0.1, 0.03, 1e-8],
            [1, 0.95, 0.95, 0.95, 0.31, 0, -1, 2.0, 0, 1, 2**-22], 1.0, torch.empty(3, 5, 8),
            *(torch.empty(5, dtype=torch.float64) for _ in range(2)), torch.empty(5, dtype=torch.bool),
            torch.empty((), dtype=torch.float64), torch.tensor(True),
        ),
        "tree_schedule": (*schedule[:4], *schedule[6:]),
        "tree_attention": (*heads, *schedule, 0.5, 2.0, out, lse, memory[0]),
        "tree_attention_backward": (
            torch.randn(5, 2, 4), *heads, out.zero_(), lse, *schedule, 0.5, 2.0, *(torch.empty_like(t) for t in heads),
            memory[1],
        ),
    }  # fmt: skip
    torch.library.opcheck(getattr(torch.ops.embedgrad, op), arguments[op])


def test_row_wise_ops_give_the_same_bits_on_any_number_of_threads() -> None:
    before, results = torch.get_num_threads(), []
    x, dy, w, angle = normal(0, (701, 96)), normal(1, (701, 96)), normal(2, (96,)), normal(3, (701, 8))
    gate_up, z = normal(4, (701, 154)), normal(5, (9, 20011))
    nll, predicted = torch.empty(9), torch.empty(9, dtype=torch.int64)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logits = z.clone()
            torch.ops.embedgrad.softmax_loss(logits, torch.arange(9), torch.ones(9), 0.0, nll, predicted)
            results.append([
                native.rms_norm(x, w, 1e-6, out=torch.empty_like(x)),
                native.rms_norm_backward(dy, x, w, 1e-6, dx=torch.zeros_like(x)),
                native.rope(x.clone(), angle.cos(), angle.sin(), (4, 1, 16)),
                native.rope_backward(x.clone(), None, angle.cos(), angle.sin(), (4, 1, 16)),
                native.swiglu(gate_up, out=torch.empty(701, 77)),
                native.swiglu_backward(gate_up[:, :77].contiguous(), gate_up, out=torch.empty(701, 154)),
                logits, nll.clone(), predicted.clone(),
            ])  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


def test_memory_that_is_too_small_is_refused() -> None:
    mask = _mask(Tree("prefix", ((-1, 5),), (), 1, None))
    q, lse = torch.randn(5, 1, 4), torch.empty(5, 1)
    with pytest.raises(RuntimeError, match=r"workspace must have \d+ bytes, not 64"):
        native.tree_attention(
            q, q, q, mask, scale=1.0, out=torch.empty_like(q), lse=lse, workspace=torch.empty(64, dtype=torch.uint8)
        )


def test_wrong_tensors_are_refused_with_their_shape() -> None:
    with pytest.raises(RuntimeError, match=r"out has shape \[3, 7\], expected \[3, 8\]"):
        torch.ops.embedgrad.rms_norm(torch.zeros(3, 8), torch.zeros(8), 1e-6, torch.zeros(3, 7))
    with pytest.raises(ValueError, match="no instruction set called mmx"), core.using("mmx"):
        pass


def test_where_the_library_is_missing_the_reference_serves_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, "llama")

    def missing(name: str) -> Any:
        if name.endswith(".native"):
            raise ImportError("csrc/ was not built")
        return import_module(name)

    monkeypatch.setattr(backends.importlib, "import_module", missing)
    with pytest.warns(backends.BackendWarning, match=r"csrc/ was not built.*C\+\+17"):
        assert load_model(tmp_path).backend == "reference"
    with pytest.raises(BackendError, match="cannot be loaded"):
        load_model(tmp_path, backend="native")


def test_what_it_does_not_compute_in_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, "llama")
    assert load_model(tmp_path).backend == "native"
    assert load_model(tmp_path, dtype=torch.float64).backend == "reference"
    with pytest.raises(BackendError, match=r"float32 or bfloat16 on a CPU, not in torch\.float64"):
        load_model(tmp_path, backend="native", dtype=torch.float64)
