"""Loss and gradient against transformers autograd, a dense float64 forward, finite differences, and themselves."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedgrad.backends import reference
from embedgrad.data.example import Example
from embedgrad.engine.gradient import _Omit, loss_and_grad
from embedgrad.engine.model import load_model
from embedgrad.engine.scorer import score
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import render
from embedgrad.util.errors import ConfigError, DataError
from tests.engine.drawn import batches, configs, make_prompt, pair, prompts
from tests.model.tiny import FAMILIES, write_folder
from tests.truth import dense_loss, relative_error, transformers_loss_and_grad, transformers_twin

drawn = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
FP32 = 2e-5  # relative error of the gradient against transformers, where both round


@drawn
@given(config=configs(), prompt=prompts(), batch=batches())
def test_gradient_equals_transformers_autograd(config: Any, prompt: Any, batch: list[Example]) -> None:
    both = pair(*config)
    p = make_prompt(both.model, prompt)
    sequences = [render(both.model, p, example) for example in batch]
    truth, truth_grad = transformers_loss_and_grad(both.twin, p.embeddings, sequences, [e.weight for e in batch])
    loss, grad = loss_and_grad(both.model, p, batch)
    assert grad.dtype == torch.float32
    assert loss == pytest.approx(truth, rel=1e-5)
    assert relative_error(grad, truth_grad) <= FP32
    assert both.model.arena.overflow == 0


@settings(drawn, max_examples=40)
@given(config=configs(), prompt=prompts(), batch=batches(most=3))
def test_float64_gradient_equals_a_dense_forward(config: Any, prompt: Any, batch: list[Example]) -> None:
    model = pair(*config, dtype=torch.float64).model
    p = make_prompt(model, prompt)
    batch = [Example(e.query, e.target) for e in batch]
    e = p.embeddings.double().requires_grad_(True)
    truth = dense_loss(model, e, [render(model, p, example) for example in batch])
    truth.backward()
    loss, grad = loss_and_grad(model, p, batch)
    assert e.grad is not None
    assert grad.dtype == torch.float64
    assert loss == pytest.approx(float(truth.detach()), rel=1e-12)
    assert relative_error(grad, e.grad) <= 1e-10


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_float64_gradient_equals_finite_differences(family: str) -> None:
    model = pair(family, {"num_hidden_layers": 2}, dtype=torch.float64).model
    p = make_prompt(model, ([9, 30, 200], "both", 1))
    e = p.embeddings.double()
    batch = [Example([10, 11, 12], [20, 21]), Example([10, 11, 40, 41], [22])]
    _, grad = loss_and_grad(model, p.replace(embeddings=e), batch)
    noise = torch.randn(e.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    direction = grad / grad.norm() + 0.1 * noise
    step = 1e-5
    ahead, _ = loss_and_grad(model, p.replace(embeddings=e + step * direction), batch)
    behind, _ = loss_and_grad(model, p.replace(embeddings=e - step * direction), batch)
    assert (ahead - behind) / (2 * step) == pytest.approx(float((grad * direction).sum()), rel=1e-6, abs=1e-9)


@settings(drawn, max_examples=40)
@given(config=configs(), prompt=prompts(), batch=batches(), omission=st.sampled_from([f.name for f in fields(_Omit)]))
def test_what_is_left_out_changes_nothing(config: Any, prompt: Any, batch: list[Example], omission: str) -> None:
    model = pair(*config, dtype=torch.float64).model
    p = make_prompt(model, prompt)
    with pytest.MonkeyPatch.context() as patch:  # these vocabularies are tiny: a row of logits at a time
        patch.setattr(reference, "LOGIT_BYTES", 1)
        loss, grad = loss_and_grad(model, p, batch)
        whole_loss, whole_grad = loss_and_grad(model, p, batch, _omit=_Omit(**{omission: False}))
    assert model.arena.overflow == 0
    assert loss == pytest.approx(whole_loss, rel=1e-13)
    assert relative_error(grad, whole_grad) <= 1e-12


@settings(drawn, max_examples=30)
@given(config=configs(), prompt=prompts(), batch=batches())
def test_policies_and_repetition_give_the_same_bits(config: Any, prompt: Any, batch: list[Example]) -> None:
    model = pair(*config).model
    p = make_prompt(model, prompt)
    loss, grad = loss_and_grad(model, p, batch, policy="all")
    for policy in ("all", "mlp", "layer", "auto"):
        model.prefix_cache.clear()
        again, same = loss_and_grad(model, p, batch, policy=policy)
        assert again == loss
        assert torch.equal(same, grad)
        assert model.arena.overflow == 0


@settings(drawn, max_examples=30)
@given(config=configs(), prompt=prompts(), batch=batches())
def test_a_batch_equals_its_examples(config: Any, prompt: Any, batch: list[Example]) -> None:
    model = pair(*config, dtype=torch.float64).model
    p = make_prompt(model, prompt)
    total = sum(e.weight for e in batch)
    loss, grad, details = loss_and_grad(model, p, batch, details=True)
    singles = [loss_and_grad(model, p, [example], details=True) for example in batch]
    assert loss == pytest.approx(sum(s[0] * e.weight for s, e in zip(singles, batch, strict=True)) / total, rel=1e-12)
    summed = sum(s[1] * (e.weight / total) for s, e in zip(singles, batch, strict=True))
    assert relative_error(grad, summed) <= 1e-11
    scored = score(model, p, batch)
    for i, (_, _, one) in enumerate(singles):
        for found in (details, scored):
            torch.testing.assert_close(found.token_nll[i], one.token_nll[0], rtol=1e-11, atol=1e-12)
            assert found.example_loss[i] == pytest.approx(float(one.example_loss[0]), rel=1e-11)
            assert bool(found.exact[i]) == bool(one.exact[0])


def test_two_targets_of_one_query_share_its_tokens() -> None:
    model = pair("llama", {}).model
    p = make_prompt(model, ([9, 30, 200], "system", 1))
    query = [50, 51, 52, 53]
    one = [Example(query, [20, 21])]
    loss_and_grad(model, p, one)
    tokens = model.arena.peak
    loss_and_grad(model, p, [*one, Example(query, [22, 23])])
    per_token = tokens / (len(render(model, p, one[0]).ids) - 1)
    assert model.arena.peak < tokens + 6 * per_token  # a target token and a predicted position more, not a sequence


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_narrow_weights_kept_as_stored_give_the_bits_of_wide_ones(tmp_path: Path, stored: torch.dtype) -> None:
    write_folder(tmp_path, "qwen2", dtype=stored)
    batch = [Example([10, 11, 12], [20, 21]), Example([10, 40, 41], [22])]
    results = []
    for weights in ("compute", "stored"):
        model = load_model(tmp_path, weights=weights)
        assert model.weights.layers[0].qkv.parts[0].dtype == (torch.float32 if weights == "compute" else stored)
        before = model.weights_hash()
        results.append(loss_and_grad(model, make_prompt(model, ([9, 30, 200], "system", 1)), batch))
        assert model.weights_hash() == before
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert relative_error(results[1][1], results[0][1]) <= 1e-6


def test_smollm2_equals_transformers(smollm2_path: Path, snippets: list[Example]) -> None:
    model = load_model(smollm2_path)
    p = SoftPrompt.from_text(model, "Classify the sentiment of the movie review. Answer with one word.")
    twin = transformers_twin(model)
    for batch in (snippets[:2], snippets[2:5]):
        truth, truth_grad = transformers_loss_and_grad(twin, p.embeddings, [render(model, p, e) for e in batch])
        loss, grad = loss_and_grad(model, p, batch)
        assert loss == pytest.approx(truth, rel=1e-5)
        assert relative_error(grad, truth_grad) <= 5e-5


def test_refusals() -> None:
    model = pair("llama", {}).model
    p = make_prompt(model, ([9, 30, 200], "system", 1))
    batch = [Example([10, 11], [20])]
    with pytest.raises(DataError, match="no examples"):
        loss_and_grad(model, p, [])
    with pytest.raises(DataError, match="number 0 is of type tuple"):
        loss_and_grad(model, p, [("a", "b")])  # type: ignore[list-item]
    with pytest.raises(DataError, match="weight 0"):
        loss_and_grad(model, p, [Example([10], [20], weight=0.0)])
    with pytest.raises(ConfigError, match="unknown memory policy 'none'"):
        loss_and_grad(model, p, batch, policy="none")
    with pytest.raises(ConfigError, match="bytes of activations"):
        loss_and_grad(model, p, batch, memory_budget=1000)
    loss, _ = loss_and_grad(model, p, batch)
    assert loss > 0
