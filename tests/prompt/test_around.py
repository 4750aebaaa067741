"""What stands around prompt and answer is what the template puts there in the conversation that is generated from."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.data.example import Example
from embedgrad.prompt.prompt import SYSTEM_TURN, USER_TURN, SoftPrompt
from embedgrad.prompt.rendering import render, render_query
from embedgrad.prompt.template import Template
from tests.prompt.fake_model import fake_model

LAST_TURN = (  # the system's text in the last user turn only, as Mistral-7B-Instruct v0.3 has it
    "{{ bos_token }}{% set s = messages[0].content if messages[0].role == 'system' else none %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] {% if loop.last and s %}{{ s }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% else %}BETWEEN{{ m.content }}AFTER{{ eos_token }}{% endif %}{% endfor %}"
)
FIRST_TURN = LAST_TURN.replace("loop.last", "loop.first")
COUNTING = LAST_TURN.replace("[INST] ", "[{{ messages|length }} INST] ")  # what stands in front changes, too


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([LAST_TURN, FIRST_TURN, COUNTING]),
    st.sampled_from([" ", "\n", "  ", ""]),
    st.sampled_from(["", "\n", " ."]),
    st.sampled_from([SYSTEM_TURN, USER_TURN]),
    st.booleans(),
)
def test_the_answer_keeps_its_space(source: str, between: str, after: str, template: Template, spaced: bool) -> None:
    chat_template = source.replace("BETWEEN", f"{{{{ {between!r} }}}}").replace("AFTER", after)
    model = fake_model("mistral", space_prefix=spaced, chat_template=chat_template)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompt = SoftPrompt.from_text(model, "Rate it.", template)
        found = render(model, prompt, Example("fine", "positive"))
    answer = [id for id, is_target in zip(found.ids, found.target_mask, strict=True) if is_target]
    tokenizer = model.tokenizer
    written = tokenizer.decode(answer, skip_special=False).removesuffix("</s>")
    assert written.strip(" ") == f"{between}positive{after}".strip(" ")
    if between == " ":
        assert tokenizer.token(answer[0]).startswith(("▁", "Ġ"))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["positive words", "Classify it.", "a", "Rate the film, please"]),
    st.sampled_from(["[INST] ", "Task: ", "x ", "[INST]\n", ""]),
    st.sampled_from(["\n\n", " [/INST] ", "\n"]),
)
def test_a_prompt_behind_a_space_is_tokenised_as_the_whole_text(text: str, before: str, after: str) -> None:
    model = fake_model("mistral", space_prefix=True)
    template = Template.text(before + "{prompt}" + after + "{query}\n")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        prompt = SoftPrompt.from_text(model, text, template)
        found = render_query(model, prompt, "fine")
    whole = f"{before}{text}{after}fine\n"
    if before.endswith(" "):
        assert model.tokenizer.decode(found.ids, skip_special=False) == whole
    if not heard:  # else the prompt's last token would have grown together with what follows
        assert found.ids == model.tokenizer.encode(whole)
    rows = [row for row in found.prompt_rows if row >= 0]
    assert rows == list(range(len(prompt.token_ids)))


def test_pieces_have_one_space_too() -> None:
    """Where the whole text splits the prompt otherwise, the parts are tokenised one by one, with one space."""
    model = fake_model("mistral", space_prefix=True)
    template = Template.text("x {prompt}{query}\n")  # no space behind the prompt: it grows together with the query
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompt = SoftPrompt.from_text(model, "positi", template)
        ids = render_query(model, prompt, "ve").ids
    assert model.tokenizer.decode(ids, skip_special=False) == "x positive\n"


@pytest.mark.parametrize("query", ["fine", "a film", "Ça"])
def test_a_query_of_ids_behind_a_space_has_one_space(query: str) -> None:
    model = fake_model("mistral", space_prefix=True)
    template = Template.text("{prompt}\n[INST] {query} [/INST]")
    prompt = SoftPrompt.from_text(model, "Rate it.", template)
    ids = model.tokenizer.encode(query)
    assert render_query(model, prompt, ids).ids == render_query(model, prompt, query).ids
