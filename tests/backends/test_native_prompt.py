"""The prompt's own operations in csrc/: embeddings, their gradient, and the optimiser's step into the trust region."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedgrad.backends.reference import OPS as reference
from embedgrad.maths.optimizer import AdamW
from embedgrad.maths.trust_region import CosineCone, L2Ball, MeanCosine, TrustRegion, cosine_similarity, norm_ratio
from tests.backends.test_native import SEEDS, instruction_sets, quick
from tests.kernels.harness import awkward_sizes, guarded, guarded_copy, laid_out, normal, three_way
from tests.kernels.test_prompt_step import REGION, state, stepped

core = pytest.importorskip("embedgrad.backends.native", exc_type=ImportError)
native = core.OPS

TYPES = st.sampled_from([torch.float32, torch.bfloat16])


def positions(seed: int, count: int, k: int) -> Tensor:
    return torch.randint(-1, k, (count,), generator=torch.Generator().manual_seed(seed))


@quick
@given(SEEDS, awkward_sizes(1, 40), awkward_sizes(1, 9), awkward_sizes(1, 70), TYPES, TYPES, instruction_sets)
def test_embed(seed: int, count: int, k: int, d: int, stored: Any, computed: Any, name: str) -> None:
    rows, table = laid_out(normal(seed, (k, d)), "wide_rows"), laid_out(normal(seed + 1, (31, d), stored), "wide_rows")
    shown, ids = positions(seed, count, k), positions(seed + 1, count, 30) + 1
    expected = reference.embed(rows, table, ids, shown, out=torch.empty(count, d, dtype=computed))
    with core.using(name):
        assert torch.equal(native.embed(rows, table, ids, shown, out=guarded((count, d), computed)), expected)

    class Packed:  # a table that is no tensor gives rows
        def __getitem__(self, index: Tensor) -> Tensor:
            return table[index]

    assert torch.equal(native.embed(rows, Packed(), ids, shown, out=guarded((count, d), computed)), expected)


@quick
@given(SEEDS, awkward_sizes(1, 200), awkward_sizes(1, 9), awkward_sizes(1, 300), TYPES, instruction_sets)
def test_embed_backward(seed: int, count: int, k: int, d: int, dtype: Any, name: str) -> None:
    """Bit for bit the sum in order of position."""
    dx, shown = laid_out(normal(seed, (count, d), dtype), "wide_rows"), positions(seed, count, k)
    expected = torch.zeros(k, d)
    for i, row in enumerate(shown.tolist()):
        if row >= 0:
            expected[row] += dx[i].float()
    with core.using(name):
        assert torch.equal(native.embed_backward(dx, shown, grad=guarded((k, d))), expected)


def test_rows_that_are_not_there_are_refused() -> None:
    rows, table, out = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(1, 4)
    with pytest.raises(IndexError, match="prompt_rows has 2 at 0, which is not below 2"):
        native.embed(rows, table, torch.tensor([0]), torch.tensor([2]), out=out)
    with pytest.raises(IndexError, match="id 3 at 0 is no row of a table of 3"):
        native.embed(rows, table, torch.tensor([3]), torch.tensor([-1]), out=out)


@settings(quick, max_examples=150)
@given(
    SEEDS, awkward_sizes(1, 7), awkward_sizes(1, 50), REGION, st.sampled_from([0.02, 0.3, 2.0]), st.integers(1, 50),
    instruction_sets,
)  # fmt: skip
@example(0, 5, 50, MeanCosine(0.95), 0.3, 1, "plain")
@example(0, 5, 50, CosineCone(-0.5, 0.9, 1.1), 2.0, 1, "plain")
@example(0, 5, 1, CosineCone(-0.5), 2.0, 1, "plain")
def test_prompt_step(seed: int, k: int, d: int, region: TrustRegion, spread: float, step: int, name: str) -> None:
    tensors = state(seed, k, d, spread)
    e, m, v = (guarded_copy(tensors[i]) for i in (0, 2, 3))
    rule, factors = AdamW(weight_decay=0.1), AdamW(weight_decay=0.1).factors(step, 0.05)
    with core.using(name):
        report = native.prompt_step(
            e, guarded_copy(tensors[1]), m, v, tensors[4].clone(), factors=factors, region=region, rule=rule
        )
    plain, _ = stepped(tensors, region, rule, step, None)
    truth, expected = stepped([x.double() for x in tensors], region, rule, step, None)
    for what, found, own, exact in zip("emv", (e, m, v), plain, truth, strict=True):
        three_way(found, own, exact, what=what, by="max")
    anchor = tensors[1]
    assert torch.allclose(report.similarity, cosine_similarity(e, anchor), atol=1e-12, rtol=0)
    assert torch.allclose(report.norm_ratio, norm_ratio(e, anchor), rtol=1e-12, atol=0)
    if isinstance(region, CosineCone):
        lost = (e == 0).all(1) | torch.tensor(d == 1)
        assert bool(((report.similarity >= region.tau - 1e-7 * (region.tau == 1)) | lost).all())
    if isinstance(region, CosineCone | L2Ball):
        differs = report.projected != expected.projected  # on the boundary to within rounding, and hardly moved
        assert ((truth[0] - plain[0].double()).abs().amax(1)[differs] < 1e-5).all()


@quick
@given(SEEDS, st.sampled_from([0.5, 0.9, 0.95, 0.999, 0.99999]), st.sampled_from([0.3, 2.0]), instruction_sets)
def test_the_cosine_is_never_below_tau_and_a_second_projection_changes_no_bit(
    seed: int, tau: float, spread: float, name: str
) -> None:
    e, anchor, m, v, g = state(seed, 9, 61, spread)
    m, g, v = torch.zeros_like(m), torch.zeros_like(g), torch.ones_like(v)
    with core.using(name):
        native.prompt_step(e, anchor, m, v, g, factors=AdamW().factors(1, 0.0), region=CosineCone(tau))
        once = e.clone()
        report = native.prompt_step(e, anchor, m, v, g, factors=AdamW().factors(1, 0.0), region=CosineCone(tau))
    assert torch.equal(e, once)
    assert not report.projected.any()
    narrow = torch.nn.functional.cosine_similarity(e.double(), anchor.double())
    assert bool(((narrow >= tau) | (e == 0).all(1) | (anchor == 0).all(1)).all())


def test_any_number_of_threads_gives_the_same_bits() -> None:
    before, results = torch.get_num_threads(), []
    tensors = state(3, 40, 300, 1.0)
    dx, shown = normal(4, (5000, 300)), positions(5, 5000, 40)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = [native.embed_backward(dx, shown, grad=torch.empty(40, 300))]
            for region in (CosineCone(0.95, 0.9, 1.1), MeanCosine(0.95), L2Ball(0.1)):
                e, anchor, m, v, g = (x.clone() for x in tensors)
                report = native.prompt_step(e, anchor, m, v, g, factors=AdamW().factors(1, 0.01), region=region)
                found += [e, m, v, report.similarity, report.norm_ratio, report.projected]
            results.append(found)
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


def test_a_step_that_is_not_finite_is_taken_back() -> None:
    tensors = state(1, 5, 20, 0.5)
    tensors[4][4, 3] = float("nan")
    e, anchor, m, v, g = (x.clone() for x in tensors)
    report = native.prompt_step(e, anchor, m, v, g, factors=AdamW().factors(1, 0.01), region=CosineCone(0.95))
    assert not bool(report.alive)
    assert all(torch.equal(x, old) for x, old in zip((e, m, v), (tensors[0], *tensors[2:4]), strict=True))
