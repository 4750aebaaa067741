"""The likeliest label: the three ways to compare continuations, against plain scoring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.data.example import Example
from embedgrad.engine.scorer import score
from embedgrad.evaluation.evaluate import evaluate, paired_tests, shares
from embedgrad.evaluation.grading.labels import GeneratedLabel
from embedgrad.evaluation.label_scores import CONTENT_FREE, LabelScorer
from embedgrad.generation.kv_cache import KeyValueCache
from embedgrad.generation.sampling import Sampling
from embedgrad.prompt.rendering import render, render_query
from tests.train.training import start_prompt, tiny_model

WORDS = ("good", "good film", "good film indeed", "bad", "bad film", "bad film again and again", "neither", "good x")
LABELS = ("good", "not so very good", "x")
EXAMPLES = [Example(f"A film of number {i}", LABELS[i % 3]) for i in range(9)]


@pytest.fixture(scope="module")
def scores() -> dict[str, list[list[float]]]:
    """Σ log p and number of tokens of each label behind each query, from the training engine."""
    model = tiny_model()
    queries = [str(example.query) for example in EXAMPLES] + [CONTENT_FREE]
    details = score(model, start_prompt(model), [Example(query, label) for query in queries for label in LABELS])
    nll = details.token_nll
    rows = [nll[3 * i : 3 * i + 3] for i in range(len(queries))]
    return {
        "plain": [[-float(t.double().sum()) for t in row] for row in rows],
        "normalised": [[-float(t.double().mean()) for t in row] for row in rows],
    }


def test_labels_are_compared_in_three_ways(scores: dict[str, list[list[float]]]) -> None:
    model = tiny_model()
    found = evaluate(model, start_prompt(model), EXAMPLES, LABELS)
    prior = scores["plain"][-1]
    for i, record in enumerate(found.records):
        plain, normalised = scores["plain"][i], scores["normalised"][i]
        calibrated = [s - p for s, p in zip(plain, prior, strict=True)]
        assert record.choice == LABELS[plain.index(max(plain))]
        assert record.choice_normalised == LABELS[normalised.index(max(normalised))]
        assert record.choice_calibrated == LABELS[calibrated.index(max(calibrated))]
    assert {record.choice for record in found.records} == {"x"}  # the shortest, which calibration does not favour
    assert "x" not in {record.choice_calibrated for record in found.records}
    assert found.choice_calibrated_accuracy is not None
    assert found.choice_calibrated_accuracy.correct == sum(r.choice_calibrated == r.target for r in found.records)


def test_an_evaluation_counts_invalid_and_truncated_answers() -> None:
    model = tiny_model()
    found = evaluate(model, start_prompt(model), EXAMPLES, LABELS, Sampling(max_new_tokens=5), GeneratedLabel(LABELS))
    assert found.statistics.invalid == sum(record.answer is None for record in found.records) / 9
    assert found.statistics.truncated == sum(record.stop_reason == "length" for record in found.records) / 9
    assert found.statistics.tokens == sum(record.tokens for record in found.records) / 9
    assert found.grader == {"kind": "label", "pattern": None, "which": "first"}
    assert found.to_dict()["statistics"]["collapse"] == found.statistics.collapse


def test_before_and_after_on_the_same_items() -> None:
    model = tiny_model()
    prompt = start_prompt(model)
    before = evaluate(model, prompt, EXAMPLES, LABELS)
    after = evaluate(model, prompt.replace(embeddings=prompt.anchor.flip(0)), EXAMPLES, LABELS)
    tests = paired_tests(before, after)
    table = shares({"before": before, "after": after})
    assert set(tests) == set(table)
    for name, test in tests.items():
        assert table[name]["after"].correct - table[name]["before"].correct == test.gained - test.lost
    without = evaluate(model, prompt, EXAMPLES)
    assert set(paired_tests(before, without)) == {"generated_accuracy"}


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=2, max_size=7, unique=True))
def test_shared_first_tokens_are_computed_once(labels: list[str]) -> None:
    """The sums are those of the training engine; there is one decoding step for each inner node of the labels' trie."""
    model = tiny_model()
    prompt = start_prompt(model)
    examples = EXAMPLES[:3]
    steps, summed = 0, []
    advance, walk = KeyValueCache.advance, LabelScorer._log_likelihoods

    def counted(cache: KeyValueCache, ids: Any) -> Any:
        nonlocal steps
        steps += 1
        return advance(cache, ids)

    def kept(scorer: LabelScorer, *arguments: Any) -> Any:
        nonlocal steps
        steps = 0
        summed.append(walk(scorer, *arguments))
        return summed[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyValueCache, "advance", counted)
        patch.setattr(LabelScorer, "_log_likelihoods", kept)
        evaluate(model, prompt, [Example(e.query, labels[0]) for e in examples], labels, Sampling(max_new_tokens=1))
    assert len(summed) == 1
    details = score(model, prompt, [Example(e.query, label) for label in labels for e in examples])
    expected = -torch.stack([nll.double().sum() for nll in details.token_nll]).view(len(labels), 3)
    torch.testing.assert_close(summed[0], expected, rtol=1e-5, atol=1e-5)
    query = len(render_query(model, prompt, str(examples[0].query)).ids)
    paths = [tuple(render(model, prompt, Example(examples[0].query, label)).ids[query:]) for label in labels]
    assert steps == len({path[:n] for path in paths for n in range(1, len(path))})
