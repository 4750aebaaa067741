"""Predicted bytes against real tensors, the arena's peak, and the kernels' own workspace."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from embedgrad.kernels import launch
from embedgrad.kernels.tree_attention_backward import workspace_size
from embedgrad.kernels.tree_schedule import TreeSchedule
from hypothesis import HealthCheck, given, settings
from torch.profiler import ProfilerActivity, profile

from bench import memory as bench
from embedgrad.data.example import Example
from embedgrad.engine.gradient import loss_and_grad, pass_over
from embedgrad.engine.memory import POLICIES, _workspace, activation_bytes, device_bytes, weight_bytes
from embedgrad.engine.model import load_model
from embedgrad.engine.tree import build_tree
from embedgrad.model import packed
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import render
from tests.engine.drawn import TEMPLATES, batches, configs, make_prompt, pair, prompts
from tests.model.tiny import write_folder


@pytest.mark.parametrize("weights", ["compute", "int8", "int4"])
@pytest.mark.parametrize(("family", "tied", "ffn"), [("qwen2", True, 96), ("qwen3", False, 100), ("llama", True, 44)])
def test_weights_take_what_is_predicted(
    tmp_path: Path, weights: str, family: str, tied: bool, ffn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the form that Triton's kernels read, which is the one without csrc/, too."""
    monkeypatch.setattr(packed, "is_built", lambda: False)
    write_folder(tmp_path, family, tie_word_embeddings=tied, intermediate_size=ffn)
    model = load_model(tmp_path, weights=weights)
    assert weight_bytes(model.config, model.dtype, weights) == sum(x.nbytes for x in model.weights.tensors())


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=configs(), prompt=prompts(), batch=batches())
def test_activations_and_kept_keys_take_what_is_predicted(config: Any, prompt: Any, batch: list[Example]) -> None:
    model = pair(*config).model
    p = make_prompt(model, prompt)
    tree = build_tree([render(model, p, example) for example in batch])
    size = pass_over(model, tree).size
    for policy in POLICIES:
        model.prefix_cache.clear()
        loss_and_grad(model, p, batch, policy=policy)
        predicted = device_bytes(model.config, size, model.dtype, policy)
        assert model.arena.peak == activation_bytes(model.config, size, model.dtype, policy, model.ops)
        assert model.arena.overflow == 0
        assert model.prefix_cache.nbytes == predicted.prefix
    masks = [tree.mask(window) for window in set(model.config.windows)]
    heads, groups, dim = model.decoder.heads
    options = launch.options("tree_attention_backward_dkv", "sm_90", dtype=model.dtype, head_dim=dim)
    bound = _workspace(model.config, size, model.dtype, "sm_90")
    for mask in masks:
        schedule = TreeSchedule(mask.key_begin, mask.key_end, mask.query_index, mask.prefix)
        assert 4 * workspace_size(schedule, heads, groups, dim, options) <= bound


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_step_allocates_nothing_large(tmp_path: Path, policy: str, dtype: torch.dtype) -> None:
    """Activations, logits and what attention needs come from the arena; the rest is a few numbers for each token."""
    write_folder(tmp_path, "qwen3", num_hidden_layers=3)
    model = load_model(tmp_path, dtype=dtype)
    if model.backend != "native":
        pytest.skip("csrc/ is not built")
    prompt = SoftPrompt.from_ids(model, list(range(10, 70)), template=TEMPLATES["system"])
    batch = [Example(list(range(20 + i, 60 + i)), [7, 8 + i]) for i in range(8)]
    loss_and_grad(model, prompt, batch, policy=policy)
    tokens = build_tree([render(model, prompt, example) for example in batch]).num_tokens
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss_and_grad(model, prompt, batch, policy=policy)
    assert model.arena.overflow == 0
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    narrowest = tokens * model.config.hidden_size * dtype.itemsize  # of all that has a row for each token
    assert 0 < largest < narrowest / 2


def test_the_benchs_rows_and_table() -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    found = bench.main(argparse.Namespace(**vars(parser.parse_args([])), quick=False))
    table = bench.tables(found)["memory"]
    assert table.count("\n") == 4
    assert "7B `layer`" in table
    rows = [{**one.case, **one.more, "total": one.median} for one in found]
    assert len(rows) == 2 * 3 * len(POLICIES)
    by = {(r["model"], r["weight_type"], r["policy"]): r for r in rows}
    big = by["Qwen2.5-Math-7B", "bf16", "all"]
    assert big["weights"] == 2 * 7_615_616_512  # parameters of the published checkpoint
    assert by["Qwen2.5-Math-1.5B", "bf16", "all"]["weights"] == 2 * 1_543_714_304
    assert by["Qwen2.5-Math-7B", "int4", "layer"]["total"] < 8 << 30 < big["total"]
    assert all(r["total"] == r["weights"] + r["activations"] + r["prefix"] + r["workspace"] for r in rows)
