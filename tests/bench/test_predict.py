"""What `bench predict` counts."""

from __future__ import annotations

import argparse

from bench import predict
from bench.harness.floor import operations
from bench.harness.models import QWEN_1_5B, config_of
from embedgrad.model.config import ModelConfig


def test_a_step_is_two_passes_over_the_weights() -> None:
    config = config_of(QWEN_1_5B)
    tree = predict._tree(4)
    own = predict.QUERY + predict.TAIL + predict.TARGET
    assert tree.num_tokens == predict.PROMPT + 4 * (own - 1)  # the header is prefix, the last token predicts nothing
    layers = sum(a * b for name, (a, b) in matrices(config).items() if "layers" in name)
    head = config.vocab_size * config.hidden_size
    expected = 4 * (layers * tree.num_tokens + head * len(tree.target_ids))
    assert 0.9 * expected < sum(operations(config, tree)) < 1.1 * expected


def test_the_run_is_the_configurations() -> None:
    rows = predict.main(argparse.Namespace(config=predict.CONFIG, answer=400))
    times = [one for one in rows if one.case["part"] == "time"]
    assert {one.case["steps"] for one in times} == {200}
    for one in times:
        assert one.median == one.more["training_seconds"] + one.more["writing_seconds"]
    assert "at least" in predict.tables(rows)["predict"]
    memory = {one.contender: one.median for one in rows if one.case["part"] == "memory"}
    assert memory["all"] > memory["mlp"] > memory["layer"]


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Names and shapes of the matrices."""
    return {name: (shape[0], shape[1]) for name, shape in config.shapes().items() if len(shape) == 2}
