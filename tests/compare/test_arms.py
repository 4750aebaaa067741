"""The arms: the tokens that the model gets in each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedgrad.compare.arms import absent, in_front
from embedgrad.compare.demonstrations import few_shot
from embedgrad.compare.peft_tuning import tune
from embedgrad.compare.runner import shuffled
from embedgrad.data.example import Example
from embedgrad.engine.model import load_model
from embedgrad.maths.trust_region import NoRegion
from embedgrad.prompt.prompt import PLAIN_TEXT, SYSTEM_TURN, USER_TURN, SoftPrompt
from embedgrad.prompt.rendering import render, render_query
from embedgrad.prompt.template import Template
from embedgrad.train.optimize import optimize
from embedgrad.train.settings import OptimizeConfig
from embedgrad.util.errors import ConfigError
from tests.model.tiny import write_folder
from tests.train.training import tiny_model

TEXT = "Say what it is."
TRAIN = [Example(f"A film of joy, number {i}", ["positive", "negative"][i % 3 == 0]) for i in range(12)]


def told(prompt: object, query: str = "A movie") -> str:
    """The text that the model gets."""
    model = tiny_model()
    return model.tokenizer.decode(render_query(model, prompt, query).ids, skip_special=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("template", [SYSTEM_TURN, USER_TURN, PLAIN_TEXT])
def test_without_a_prompt_nothing_of_it_is_shown(template: Template) -> None:
    model = tiny_model()
    prompt = absent(model, template)
    sequence = render_query(model, prompt, "A movie")
    assert set(sequence.prompt_rows) == {-1}
    expected = (
        "<|im_start|>user\nA movie<|im_end|>\n<|im_start|>assistant\n" if template.kind == "chat" else "A movie\n\n"
    )
    assert told(prompt).removeprefix("<|im_start|>" if template.kind == "text" else "") == expected


@pytest.mark.parametrize("template", [SYSTEM_TURN, USER_TURN, PLAIN_TEXT])
def test_in_front_is_the_prompt_and_then_the_rest(template: Template) -> None:
    model = tiny_model()
    moved, bare = in_front(model, TEXT, template), absent(model, template)
    sequence, rest = render_query(model, moved, "A movie"), render_query(model, bare, "A movie")
    count = len(moved.token_ids)
    first = sequence.prompt_rows.index(0)
    assert sequence.prompt_rows[first : first + count] == list(range(count))
    assert sequence.ids[:first] + sequence.ids[first + count :] == rest.ids
    assert first == 0 or template.kind == "text"  # a text template begins with its BOS


@pytest.mark.parametrize("template", [SYSTEM_TURN, USER_TURN, PLAIN_TEXT])
def test_demonstrations_stand_before_the_query_and_show_every_label(template: Template) -> None:
    model = tiny_model()
    prompts = few_shot(model, TEXT, template, TRAIN, 4, seed=1)
    assert len({prompt.template for prompt in prompts}) > 1
    for prompt in prompts:
        text = told(prompt)
        assert text.count("positive") == text.count("negative") == 2
        assert text.count(TEXT) == 1
        assert text.rindex("A movie") > max(text.rindex("positive"), text.rindex("negative"))
        rows = render_query(model, prompt, "A movie").prompt_rows
        assert [row for row in rows if row >= 0] == list(range(len(prompt.token_ids)))
    assert few_shot(model, TEXT, template, TRAIN, 4, seed=1)[0].template == prompts[0].template
    assert few_shot(model, TEXT, template, TRAIN, 4, seed=2)[0].template != prompts[0].template


def test_demonstrations_that_cannot_be_are_refused_in_words() -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="20 demonstrations need as many training examples of text; there are 12"):
        few_shot(model, TEXT, SYSTEM_TURN, TRAIN, 20, seed=0)
    with pytest.raises(ConfigError, match="no 12 demonstrations leave room in the model's context"):
        few_shot(model, TEXT, SYSTEM_TURN, TRAIN, 12, seed=0)
    with pytest.raises(ConfigError, match="a plain template has no turns"):
        few_shot(model, TEXT, Template.plain(), TRAIN, 2, seed=0)
    slots = [Example("What is {query}?", "positive")] * 3
    with pytest.raises(ConfigError, match="there are 0"):
        few_shot(model, TEXT, SYSTEM_TURN, slots, 2, seed=0)


def test_shuffled_labels_are_the_same_labels_elsewhere() -> None:
    mixed = shuffled(TRAIN, seed=3)
    assert [e.query for e in mixed] == [e.query for e in TRAIN]
    assert sorted(str(e.target) for e in mixed) == sorted(str(e.target) for e in TRAIN)
    assert [e.target for e in mixed] != [e.target for e in TRAIN]
    assert mixed == shuffled(TRAIN, seed=3) != shuffled(TRAIN, seed=4)


def test_peft_takes_our_unconstrained_steps() -> None:
    """If all targets have the same length, PEFT's loss and AdamW's steps are equal to ours."""
    model = tiny_model()
    prompt = in_front(model, TEXT, SYSTEM_TURN)
    train = [Example(f"A film, number {i}", "positive") for i in range(6)]
    assert len({sum(render(model, prompt, e).target_mask) for e in train}) == 1
    config = OptimizeConfig(steps=4, batch_size=3, learning_rate=1e-2, trust_region=NoRegion(), validate_every=2)
    theirs, figures = tune(model, prompt, train, [], config)
    ours = optimize(model, prompt, train, [], config).last_prompt
    moved = (ours.embeddings - prompt.embeddings).norm()
    assert float((theirs.embeddings - ours.embeddings).norm() / moved) < 2e-3
    assert (
        figures["forward_tokens"]
        == figures["backward_tokens"]
        == 2 * sum(len(render(model, prompt, e).ids) for e in train)
    )
    _, watched = tune(model, prompt, train, train[:2], config)
    assert watched["validation"]["after"]["loss"] < watched["validation"]["before"]["loss"]
    assert watched["best_step"] > 0
    assert not torch.equal(theirs.embeddings, prompt.embeddings)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "granite", "olmo2", "phi3"])
def test_peft_takes_the_same_steps_with_other_families(tmp_path: Path, family: str) -> None:
    """Gemma's embedding module multiplies by c, so that PEFT's rows and its steps are c times ours."""
    write_folder(tmp_path, family)
    model = load_model(tmp_path)
    prompt = SoftPrompt.from_ids(model, [9, 30, 200, 31], template=Template.plain())
    train = [Example([10 + i, 50 + i, 60], [20 + i]) for i in range(6)]
    rates = 1e-2, 1e-2 * model.config.input_scale
    mine, peft = (OptimizeConfig(steps=4, batch_size=3, learning_rate=rate, trust_region=NoRegion()) for rate in rates)
    ours = optimize(model, prompt, train, [], mine).last_prompt
    theirs, _ = tune(model, prompt, train, [], peft)
    moved = (ours.embeddings - prompt.embeddings).norm()
    assert float((theirs.embeddings - ours.embeddings).norm() / moved) < 2e-3
