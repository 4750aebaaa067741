"""csrc/ on bfloat16 by the three-way rule, and the engine with bfloat16 activations on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedgrad.backends.reference import OPS as reference
from embedgrad.engine.gradient import loss_and_grad
from embedgrad.engine.model import load_model
from embedgrad.model.frozen import ROWS, SUM_ROWS, FrozenMatrix, Widening
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.template import Template
from tests.backends.test_native import SEEDS, _mask, instruction_sets, quick
from tests.engine.drawn import batches, configs, make_prompt, pair, prompts
from tests.kernels.harness import awkward_sizes, guarded, laid_out, normal, three_way
from tests.kernels.trees import Tree, dense, dense_backward, magnitudes, seen, trees
from tests.model.tiny import write_folder
from tests.truth import relative_error

core = pytest.importorskip("embedgrad.backends.native", exc_type=ImportError)
native = core.OPS

BF16 = torch.bfloat16
WEIGHTS = [BF16, torch.float32]  # of norms
HALF = 2.0**-8  # half a unit in the last place


def three(run: Any) -> tuple[Tensor, Tensor]:
    """What the reference gives in bfloat16 and, from the same numbers, in float64."""
    return run(lambda x: x.clone()), run(lambda x: x.double())


@quick
@given(
    SEEDS, awkward_sizes(1, 9), awkward_sizes(1, 70), st.sampled_from([1e-2, 1.0, 1e3]), st.sampled_from(WEIGHTS),
    instruction_sets,
)  # fmt: skip
def test_norms(seed: int, rows: int, width: int, scale: float, weights: torch.dtype, name: str) -> None:
    x, dy = laid_out(normal(seed, (rows, width), BF16, scale), "wide_rows"), normal(seed + 1, (rows, width), BF16)
    weight = normal(seed + 2, (width,), weights)
    before = normal(seed + 4, (rows, width), BF16, 1 / scale)
    shape = (rows, width)
    empty = torch.empty(shape, dtype=BF16)
    with core.using(name):
        plain, truth = three(lambda of: reference.rms_norm(of(x), of(weight), 1e-6, out=of(empty)))
        three_way(native.rms_norm(x, weight, 1e-6, out=guarded(shape, BF16)), plain, truth)
        plain, truth = three(lambda of: reference.rms_norm_backward(of(dy), of(x), of(weight), 1e-6, dx=of(before)))
        found = native.rms_norm_backward(dy, x, weight, 1e-6, dx=laid_out(before, "wide_rows"))
        three_way(found, plain, truth)


@quick
@given(
    SEEDS, awkward_sizes(1, 5), awkward_sizes(1, 20), st.integers(0, 4), st.integers(0, 3),
    st.sampled_from([None, *WEIGHTS]), instruction_sets,
)  # fmt: skip
def test_rope_and_its_transpose(
    seed: int, rows: int, half: int, h: int, g: int, normed: torch.dtype | None, name: str
) -> None:
    heads, width = (h, g, 2 * half), (h + 2 * g) * 2 * half
    qkv, raw = normal(seed, (rows, width), BF16), normal(seed + 2, (rows, width), BF16)
    angle = normal(seed + 1, (rows, half), scale=3.0)
    tables = angle.cos().to(BF16), angle.sin().to(BF16)
    norms = [normal(seed + i, (2 * half,), normed) if normed else None for i in (3, 4)]

    def arguments(of: Any) -> dict[str, Any]:
        q, k = (None if w is None else of(w) for w in norms)
        cos, sin = (of(x) for x in tables)
        return {"cos": cos, "sin": sin, "heads": heads, "q_norm": q, "k_norm": k, "eps": 1e-6}

    with core.using(name):
        plain, truth = three(lambda of: reference.rope(of(qkv), **arguments(of)))
        three_way(native.rope(laid_out(qkv, "wide_rows"), **arguments(lambda x: x)), plain, truth, tolerance=2 * HALF)
        plain, truth = three(lambda of: reference.rope_backward(of(qkv), of(raw), **arguments(of)))
        found = native.rope_backward(laid_out(qkv, "wide_rows"), raw, **arguments(lambda x: x))
        # rounded between rotation and norm; what cancels in the norm's backward is all of it for a head of one number
        smallest = raw.double().unflatten(1, (-1, 2 * half)).square().mean(-1) if normed and width else torch.ones(1)
        terms = float(smallest.rsqrt().amax())
        three_way(found, plain, truth, tolerance=2 * HALF * max(1.0, 10 * terms), factor=2.0)


@quick
@given(SEEDS, awkward_sizes(1, 5), awkward_sizes(1, 70), st.sampled_from([1.0, 30.0]), instruction_sets)
def test_swiglu(seed: int, rows: int, width: int, scale: float, name: str) -> None:
    gate_up = laid_out(normal(seed, (rows, 2 * width), BF16, scale), "wide_rows")
    da = normal(seed + 1, (rows, width), BF16)
    with core.using(name):
        plain, truth = three(lambda of: reference.swiglu(of(gate_up), out=of(torch.empty(rows, width, dtype=BF16))))
        three_way(native.swiglu(gate_up, out=guarded((rows, width), BF16)), plain, truth)
        plain, truth = three(lambda of: reference.swiglu_backward(of(da), of(gate_up), out=of(gate_up)))
        three_way(native.swiglu_backward(da, gate_up, out=guarded((rows, 2 * width), BF16)), plain, truth)
        three_way(native.swiglu_backward(da, gate_up, out=gate_up), plain, truth)


@quick
@given(
    SEEDS, trees(), st.sampled_from([(1, 1, 8), (6, 2, 16), (4, 4, 33)]), st.sampled_from([None, 3.0]), instruction_sets
)
def test_tree_attention(seed: int, tree: Tree, heads: tuple[int, int, int], softcap: float | None, name: str) -> None:
    h, g, size = heads
    mask, visible = _mask(tree), seen(tree.schedule())
    queries, keys = len(mask.query_index), len(mask.key_begin)
    q, do = (normal(seed + i, (queries, h, size), BF16) for i in range(2))
    k, v = (normal(seed + i, (keys, g, size), BF16) for i in (2, 3))
    wide = [x.double() for x in (q, k, v)]
    truth, lse = dense(*wide, visible, size**-0.5, softcap)
    with core.using(name):
        o, l = native.tree_attention(
            q,
            k,
            v,
            mask,
            scale=size**-0.5,
            softcap=softcap,
            out=guarded((queries, h, size), BF16),
            lse=guarded((queries, h)),
        )
        own = keys - mask.prefix
        grads = [guarded((n, m, size), BF16) for n, m in ((queries, h), (own, g), (own, g))]
        native.tree_attention_backward(
            do, q, k, v, o, l, mask, scale=size**-0.5, softcap=softcap, dq=grads[0], dk=grads[1], dv=grads[2]
        )
    plain = torch.empty(queries, h, size, dtype=BF16)
    reference.tree_attention(q, k, v, mask, scale=size**-0.5, softcap=softcap, out=plain, lse=torch.empty(queries, h))
    three_way(o, plain, truth)
    finite = lse != float("-inf")
    assert ((l - lse)[finite].abs() <= 1e-5 * (1 + lse[finite].abs())).all()
    plainly = [torch.empty_like(x) for x in grads]
    reference.tree_attention_backward(
        do, q, k, v, plain, l, mask, scale=size**-0.5, softcap=softcap, dq=plainly[0], dk=plainly[1], dv=plainly[2]
    )
    exact = dense_backward(do.double(), *wide, visible, size**-0.5, softcap)
    sizes = magnitudes(do.double(), *wide, visible, size**-0.5, softcap)  # of what cancels
    firsts = (0, mask.prefix, mask.prefix)
    for found, own, right, magnitude, first in zip(grads, plainly, exact, sizes, firsts, strict=True):
        error, allowed = ((x.double() - right[first:]).norm() for x in (found, own))
        assert float(error) <= float(allowed) + HALF * float(magnitude[first:].norm())


@quick
@given(
    SEEDS, st.integers(1, 2 * ROWS), awkward_sizes(1, 9), st.sampled_from([7, 40, SUM_ROWS + 5]),
    st.booleans(), st.booleans(), st.sampled_from(["narrow", "wide", "mixed"]),
)  # fmt: skip
def test_narrow_matrices_multiply_wide(
    seed: int, tokens: int, inputs: int, outputs: int, biased: bool, added: bool, stored: str
) -> None:
    """Sums are float32 and rounded once, whatever is narrow: x, the weights, or both; also in several tiles."""
    tokens = min(tokens, 60) if outputs > 100 else tokens
    w, x = normal(seed, (outputs, inputs), BF16), normal(seed + 1, (tokens, inputs), BF16)
    dy, add = normal(seed + 2, (tokens, outputs), BF16), normal(seed + 3, (tokens, outputs), BF16)
    bias = normal(seed + 4, (outputs,), BF16) if biased else None
    parts = {"narrow": [w], "wide": [w.float()], "mixed": [w[:3], w[3:].float()]}[stored]
    matrix = FrozenMatrix(parts, bias, Widening(torch.float32, torch.device("cpu")))
    truth = x.double() @ w.double().T + (0 if bias is None else bias.double()) + (add.double() if added else 0)
    found = matrix.forward(x, guarded((tokens, outputs), BF16), add=add if added else None)
    three_way(found, truth.to(BF16), truth, tolerance=1e-6)
    truth = dy.double() @ w.double()
    three_way(matrix.backward(dy, guarded((tokens, inputs), BF16)), truth.to(BF16), truth, tolerance=1e-5)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=configs(), prompt=prompts(), batch=batches())
def test_the_engine_in_bfloat16(config: Any, prompt: Any, batch: list[Any]) -> None:
    """No farther from float64 than the reference in bfloat16 is, and the policies agree bit for bit."""
    model, wide = pair(*config, dtype=BF16).model, pair(*config, dtype=torch.float64).model
    assert model.backend == "native"
    p = make_prompt(model, prompt)
    found = [loss_and_grad(model, p, batch, policy=policy) for policy in ("all", "mlp", "layer")]
    assert model.arena.overflow == 0
    for loss, grad in found[1:]:
        assert loss == found[0][0]
        assert torch.equal(grad, found[0][1])
    truth_loss, truth = loss_and_grad(wide, make_prompt(wide, prompt), batch)
    model.decoder.ops = model.ops = reference
    model.prefix_cache.clear()
    try:
        _, plain = loss_and_grad(model, p, batch)
    finally:
        model.decoder.ops = model.ops = native
        model.prefix_cache.clear()
    assert found[0][0] == pytest.approx(truth_loss, rel=0.02)
    # A model of width 4 averages nothing: either may have the luckier roundings.
    factor, more = (1.5, 0.02) if model.config.hidden_size >= 8 else (2, 0.04)
    assert relative_error(found[0][1], truth) <= factor * relative_error(plain, truth) + more


def test_a_bfloat16_model_writes_answers(tmp_path: Path) -> None:
    import embedgrad

    write_folder(tmp_path, "qwen3")
    model = load_model(tmp_path, dtype="bf16")
    assert (model.backend, model.dtype) == ("native", BF16)
    prompt = SoftPrompt.from_ids(model, [9, 30], template=Template.plain())
    (answer,) = embedgrad.generate(model, prompt, [[50]], embedgrad.Sampling(max_new_tokens=3))
    assert len(answer.ids) == 3
