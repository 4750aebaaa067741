"""Generated text against transformers, and batches against single queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedgrad.data.example import Example
from embedgrad.engine.model import load_model
from embedgrad.engine.scorer import score
from embedgrad.evaluation.evaluate import Accuracy, check_evaluation, evaluate, same_answer
from embedgrad.generation.generate import generate
from embedgrad.generation.sampling import Sampling
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import render_query
from embedgrad.prompt.template import Template
from embedgrad.util.errors import ConfigError, ContextError, DataError
from tests.engine.drawn import VOCABULARY, configs, make_prompt, pair, prompts
from tests.truth import transformers_inputs, transformers_twin

drawn = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
queries = st.lists(st.lists(st.integers(5, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=4)


@drawn
@given(config=configs(), prompt=prompts(), asked=queries)
def test_greedy_tokens_are_those_of_repeated_whole_forwards(config: Any, prompt: Any, asked: Any) -> None:
    both = pair(*config)
    p = make_prompt(both.model, prompt)
    answers = generate(both.model, p, asked, Sampling(max_new_tokens=6))
    for query, answer in zip(asked, answers, strict=True):
        x, table = transformers_inputs(both.twin, p.embeddings, render_query(both.model, p, query))
        for token in answer.ids:
            logits = both.twin(inputs_embeds=x[None], use_cache=False).logits[0, -1]
            assert float(logits.max() - logits[token]) <= 1e-3
            x = torch.cat([x, table[token][None]])


@drawn
@given(
    config=configs(), prompt=prompts(), asked=queries, size=st.integers(1, 3), temperature=st.sampled_from([0.0, 1.0])
)
def test_a_batch_answers_as_single_queries_do(
    config: Any, prompt: Any, asked: Any, size: int, temperature: float
) -> None:
    model = pair(*config, dtype=torch.float64).model
    p = make_prompt(model, prompt)
    sampling = Sampling(max_new_tokens=70 if size == 3 else 5, temperature=temperature, seed=3)
    together = generate(model, p, asked, sampling)
    assert generate(model, p, asked, sampling, batch_size=size) == together
    assert generate(model, p, asked[:1], sampling) == together[:1]


def test_stop_reasons_and_stop_texts() -> None:
    model = pair("llama", {"max_position_embeddings": 64}).model
    p = make_prompt(model, ([9, 30, 200], "system", 1))
    query = [50, 51]
    context = len(render_query(model, p, query).ids)
    full = generate(model, p, [query], Sampling(max_new_tokens=200))[0]
    if full.stop_reason == "context":
        assert context + len(full.ids) == 64
    short = generate(model, p, [query], Sampling(max_new_tokens=3))[0]
    assert (short.ids, short.stop_reason) == (full.ids[:3], "length")
    piece = model.tokenizer.decode(full.ids[:3])[1:3]
    stopped = generate(model, p, [query], Sampling(max_new_tokens=200, stop=(piece,)))[0]
    assert stopped.stop_reason == "stop"
    assert piece not in stopped.text
    assert full.text.startswith(stopped.text)
    with pytest.raises(ContextError):
        generate(model, p, [list(range(5, 70))])
    assert generate(model, p, []) == []


def test_queries_that_share_no_token_behind_a_sliding_window() -> None:
    """Their shared prefix is empty, and nothing is computed for it."""
    model = pair("mistral", {"sliding_window": 3}, dtype=torch.float64).model
    p = SoftPrompt.from_ids(model, [9, 30, 200], template=Template.text("{query}{prompt}"))
    asked = [[50, 51, 52], [60, 61]]
    together = generate(model, p, asked, Sampling(max_new_tokens=6))
    assert together == [generate(model, p, [query], Sampling(max_new_tokens=6))[0] for query in asked]


def test_unusable_queries_are_refused_before_the_first_answer() -> None:
    model = pair("llama", {"max_position_embeddings": 64}).model
    p = make_prompt(model, ([9, 30, 200], "system", 1))
    answered: list[int] = []
    room = 64 - len(render_query(model, p, [50]).ids)
    asked = [[50], [50] * (room + 1)]
    with pytest.raises(ContextError, match="query 1 takes"):
        generate(model, p, asked, batch_size=1, on_answer=lambda index, _: answered.append(index))
    assert answered == []
    with pytest.raises(ConfigError, match="batch_size is 0"):
        generate(model, p, [[50]], batch_size=0)
    with pytest.raises(DataError, match="not one text"):
        generate(model, p, "a film")
    examples = [Example("a film", "good")]
    for labels, words in (([], "at least one text"), ("good", "at least one text"), (["bad"], "not one of bad")):
        with pytest.raises(DataError, match=words):
            check_evaluation(model, p, examples, labels)


def test_unusable_settings_are_refused() -> None:
    for wrong in (
        {"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0},
        {"min_p": 2.0}, {"stop": "text"}, {"stop": ("",)}, {"stop": 3}, {"temperature": 1e-300}, {"temperature": "hot"},
        {"max_new_tokens": 2.5}, {"top_k": True}, {"top_p": None}, {"seed": 0.5}, {"seed": -1}, {"seed": 1 << 64},
        {"repetition_penalty": 0.0}, {"presence_penalty": float("inf")}, {"frequency_penalty": None},
        {"logit_bias": [1]}, {"logit_bias": {-1: 0.0}}, {"logit_bias": {"a": 0.0}}, {"logit_bias": {3: float("nan")}},
        {"logit_bias": {3: float("inf")}}, {"choices": "yes"}, {"choices": ("",)},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            Sampling(**wrong)


@drawn
@given(config=configs(), prompt=prompts())
def test_evaluation_agrees_with_scoring(config: Any, prompt: Any) -> None:
    model = pair(*config, dtype=torch.float64).model
    p = make_prompt(model, prompt)
    labels = ["positive", "negative", "a movie"]
    examples = [Example([50 + i, 51, 52][: 1 + i], labels[i % 3]) for i in range(4)]
    found = evaluate(model, p, examples, labels)
    for example, record in zip(examples, found.records, strict=True):
        options = score(model, p, [Example(example.query, label) for label in labels]).token_nll
        assert record.choice == labels[int(torch.stack([-nll.sum() for nll in options]).argmax())]
    assert found.choice_accuracy is not None
    assert found.choice_accuracy.correct == sum(r.choice == r.target for r in found.records)


def test_wilson_interval_and_answers() -> None:
    accuracy = Accuracy.of([True] * 8 + [False] * 2)
    assert (accuracy.low, accuracy.high) == (pytest.approx(0.4901625), pytest.approx(0.9433178))
    assert same_answer(" Positive.\n", "positive")
    assert not same_answer("positive review", "positive")


@pytest.mark.slow
def test_smollm2_generates_what_transformers_generates(smollm2_path: Path, snippets: list[Example]) -> None:
    model = load_model(smollm2_path)
    p = SoftPrompt.from_text(model, "You are a helpful assistant that comments on film reviews.")
    twin = transformers_twin(model)
    asked = [str(e.query) for e in snippets[:20]]
    sampling = Sampling(max_new_tokens=40)
    together = generate(model, p, asked, sampling)
    for query, answer in zip(asked, together, strict=True):
        assert generate(model, p, [query], sampling)[0].ids == answer.ids
        ids = render_query(model, p, query).ids
        out = twin.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=2, pad_token_id=2)
        expected = [t for t in out[0, len(ids) :].tolist() if t != 2]
        for n, (ours, theirs) in enumerate(zip(answer.ids, expected, strict=False)):
            if ours != theirs:
                logits = twin(torch.tensor([ids + expected[:n]])).logits[0, -1]
                assert abs(float(logits[ours] - logits[theirs])) <= 1e-3
                break
        else:
            assert len(answer.ids) == len(expected)
