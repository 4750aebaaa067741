"""The transformers twin: of every family the same logits as the model that the weights were written by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from embedgrad.compare.twin import no_twin, transformers_twin
from embedgrad.engine.model import load_model
from embedgrad.util.errors import ConfigError
from tests.engine.drawn import configs, pair
from tests.model.test_families import LONGROPE
from tests.model.tiny import FAMILIES, write_folder

IDS = torch.tensor([[5, 30, 200, 31, 77, 12, 9, 8, 7, 300, 41, 6]])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=configs())
def test_a_twin_has_the_logits_of_the_original(config: Any) -> None:
    both = pair(*config)
    twin = transformers_twin(both.model, "sdpa")
    assert type(twin) is type(both.twin)
    with torch.no_grad():
        found, expected = (model(IDS, use_cache=False).logits for model in (twin, both.twin))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_it_shares_the_matrices(family: str) -> None:
    model = pair(family, {}).model
    twin = transformers_twin(model)
    shared = {x.untyped_storage().data_ptr() for x in model.weights.layers[0].tensors()}
    assert twin.model.layers[0].mlp.down_proj.weight.untyped_storage().data_ptr() in shared
    assert twin.get_input_embeddings().weight.data_ptr() == model.weights.embedding.data_ptr()
    assert not any(parameter.requires_grad for parameter in twin.parameters())


def test_other_forms_are_refused_in_a_sentence() -> None:
    assert no_twin(pair("gemma2", {}, dtype=torch.float64).model) == (
        "a transformers twin shares float32 weights on the CPU; load the model with weights=fp32 there."
    )
    with pytest.raises(ConfigError, match="weights=fp32"):
        transformers_twin(pair("llama", {}, dtype=torch.bfloat16).model)


def test_a_long_context_has_no_twin(tmp_path: Path) -> None:
    write_folder(tmp_path, "phi3", **LONGROPE)
    with pytest.raises(ConfigError, match="load it without long_context"):
        transformers_twin(load_model(tmp_path, long_context=True))
    assert no_twin(load_model(tmp_path)) is None
