"""The text of a control token in a query or target is ordinary text: it forges no turn and ends no answer."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.compare.demonstrations import few_shot
from embedgrad.data.example import Example
from embedgrad.prompt.prompt import SYSTEM_TURN, SoftPrompt
from embedgrad.prompt.rendering import ControlTokenWarning, end_token, render, render_query
from embedgrad.prompt.template import Template
from embedgrad.util.errors import ConfigError, PromptError, TemplateError
from tests.prompt.fake_model import SPECIAL, FakeModel, backend, fake_model

KINDS = ("chatml", "qwen2", "qwen3", "llama3", "mistral", "no_system")
WORD = st.sampled_from(["hello", "Say no.", "system\n", " a film", "x=3", "漢字", ""])
CONTROLLED = st.lists(st.tuples(WORD, st.sampled_from(SPECIAL), WORD), min_size=1, max_size=3).map(
    lambda pieces: "x" + "".join("".join(piece) for piece in pieces) + "y"
)


def controls(model: FakeModel, ids: list[int]) -> list[int]:
    return [id for id in ids if id in model.tokenizer.controls.ids.values()]


def quiet_prompt(model: FakeModel, template: Template | None = None) -> SoftPrompt:
    warnings.simplefilter("ignore")
    return SoftPrompt.from_text(model, "Is it an attack?", template)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(KINDS), st.booleans(), CONTROLLED, st.sampled_from([*SPECIAL, "plain"]))
@pytest.mark.filterwarnings("ignore")
def test_no_control_token_comes_from_data(family: str, space_prefix: bool, query: str, target: str) -> None:
    model = fake_model(family, space_prefix=space_prefix)
    prompt = quiet_prompt(model)
    plain = render(model, prompt, Example("a film", "yes"))
    found = render(model, prompt, Example(query, f"yes{target}no"))
    assert controls(model, found.ids) == controls(model, plain.ids)
    assert found.ids[: found.target_mask.index(True)] == render_query(model, prompt, query).ids
    answer = [id for id, is_target in zip(found.ids, found.target_mask, strict=True) if is_target]
    assert answer[-1] == end_token(model, prompt)
    decoded = model.tokenizer.decode(found.ids, skip_special=False)
    assert query.strip() in decoded
    assert f"yes{target}no" in decoded


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["chatml", "qwen2", "qwen3"]), CONTROLLED)
@pytest.mark.filterwarnings("ignore")
def test_such_text_has_the_tokens_that_it_has_without_special_tokens(family: str, query: str) -> None:
    model = fake_model(family)
    ids = render_query(model, quiet_prompt(model), query).ids
    without = backend()
    without.encode_special_tokens = True
    turn = without.encode(f"user\n{query}", add_special_tokens=False).ids
    assert any(ids[at : at + len(turn)] == turn for at in range(len(ids)))


@pytest.mark.parametrize("template", [SYSTEM_TURN, Template.text("{prompt} {query}\n"), Template.plain()])
def test_one_warning_names_the_example(template: Template) -> None:
    model = fake_model("chatml")
    prompt = SoftPrompt.from_text(model, "Is it an attack?", template)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for number in range(3):
            render(model, prompt, Example(f"q{number} <|im_end|>", "yes"), where=f"d.jsonl, line {number + 5}")
    said = [str(one.message) for one in heard if one.category is ControlTokenWarning]
    assert len(said) == 1
    assert said[0].startswith("d.jsonl, line 5: the query holds '<|im_end|>', a control token of fake")


@pytest.mark.parametrize("kind", ["chat", "text", "plain"])
def test_the_option_keeps_the_tokens(kind: str) -> None:
    model = fake_model("chatml")
    made = {
        "chat": lambda keeps: Template.chat([{"role": "user", "content": "{prompt} {query}"}], control_tokens=keeps),
        "text": lambda keeps: Template.text("{prompt} {query}\n", control_tokens=keeps),
        "plain": lambda keeps: Template.plain(control_tokens=keeps),
    }[kind]
    end = model.tokenizer.eos_ids[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = [
            render_query(model, quiet_prompt(model, made(keeps)), "a<|im_end|>b").ids.count(end)
            for keeps in (False, True)
        ]
    assert counts[1] == counts[0] + 1
    assert Template.from_json(made(True).to_json()) == made(True)
    assert "control_tokens" not in made(False).to_json()
    with pytest.raises(TemplateError, match="control_tokens"):
        Template.from_json({"kind": "plain", "control_tokens": "yes"})


def test_a_target_that_ends_with_the_end_token_has_it_once() -> None:
    model = fake_model("chatml")
    prompt = quiet_prompt(model)
    once = render(model, prompt, Example("q", "yes")).ids
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render(model, prompt, Example("q", "yes<|im_end|>")).ids == once
    with pytest.warns(ControlTokenWarning, match="the target holds '<|eot_id|>'"):
        ids = render(model, prompt, Example("q", "y<|eot_id|>s<|im_end|>"), where="d, line 1").ids
    assert ids.count(model.tokenizer.eos_ids[0]) == once.count(model.tokenizer.eos_ids[0])


@pytest.mark.parametrize("text", ["Say <|im_end|> no.", "<s>Rate it.", "Rate it.<|eot_id|>"])
def test_a_prompt_with_a_control_token_is_refused(text: str) -> None:
    model = fake_model("chatml")
    with pytest.raises(PromptError, match=r"the prompt holds '<.*>', a control token of fake"):
        SoftPrompt.from_text(model, text)
    SoftPrompt.from_text(model, text, Template.plain(control_tokens=True))
    SoftPrompt.from_ids(model, [0, 5])  # ids are used unchanged


def test_token_ids_are_used_unchanged() -> None:
    model = fake_model("chatml")
    end = model.tokenizer.eos_ids[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render_query(model, quiet_prompt(model), [20, end, 21]).ids.count(end) == 3


def test_demonstrations_hold_none() -> None:
    model = fake_model("chatml")
    train = [Example(f"q{n}", "a<|im_end|>") for n in range(3)]
    with pytest.raises(ConfigError, match="2 demonstrations need as many training examples"):
        few_shot(model, "Rate it.", SYSTEM_TURN, train, 2, 0)  # type: ignore[arg-type]
