"""The Jinja front that puts prompts into a caller's messages."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.exports.chat_template import Placed, chat_template, literal
from embedgrad.prompt.sandbox import compile_chat_template
from embedgrad.prompt.template import Template
from embedgrad.util.errors import ExportError, TemplateError
from tests.model.tiny import CHAT_TEMPLATE

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=12)
values = st.recursive(
    texts | st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(values)
def test_literals_are_read_back_by_jinja(value: Any) -> None:
    assert jinja2.Environment().compile_expression(literal(value), undefined_to_none=False)() == value


@settings(deadline=None)
@given(
    begin=st.sampled_from(["", " ", "\n", "\n\n", "x"]),
    end=st.sampled_from(["", "\n", " \n", "\n\n", "y"]),
    own=st.sampled_from([None, "A{{ messages[0].content }}", " \nB{{ messages[-1].content }}\n\n"]),
)
def test_white_space_of_the_models_template_stays(begin: str, end: str, own: str | None) -> None:
    """The front adds nothing, with one template or several."""
    source = begin + CHAT_TEMPLATE + end
    messages = [{"role": "system", "content": "{prompt}"}, {"role": "user", "content": "{query}"}]
    templates = {"a": Template.chat(messages), "b": Template.chat(messages, chat_template=own)}
    placed = [Placed(name, template, f"<{name.upper()}>") for name, template in templates.items()]
    made = chat_template(placed, source)
    query = [{"role": "user", "content": "q"}]
    for name, text, wanted in (("a", "<A>", source), ("b", "<B>", own or source), ("none", "", source)):
        before = [{"role": "system", "content": text}] if text else []
        assert _render(made, query, embedgrad_prompt=name) == _render(wanted, [*before, *query])


def test_variables_of_a_prompts_template_can_be_changed_by_the_caller() -> None:
    source = "{{ enable_thinking }} {{ words | join(' ') }}"
    messages = [{"role": "user", "content": "{prompt}{query}"}]
    variables = {"enable_thinking": False, "words": ["a", "b'"]}
    made = chat_template([Placed("a", Template.chat(messages, variables=variables), "<A>")], source)
    query = [{"role": "user", "content": "q"}]
    assert _render(made, query) == "False a b'"
    assert _render(made, query, enable_thinking=True) == "True a b'"
    odd = Template.chat(messages, variables={"a b": 1})
    with pytest.raises(ExportError, match="sets the variable 'a b'"):
        chat_template([Placed("a", odd, "<A>")], source)


def test_what_a_prompt_cannot_take_is_said() -> None:
    user = Template.chat([{"role": "user", "content": "{prompt} {query}"}])
    text = Template.text("{prompt}{query}")
    made = chat_template([Placed("a", user, "<A>"), Placed("t", text, "<T>")], CHAT_TEMPLATE)
    parts: Any = [{"role": "user", "content": 3}]
    with pytest.raises(TemplateError, match="the prompt a takes messages with text only"):
        _render(made, parts)
    two = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    with pytest.raises(TemplateError, match="the prompt t stands in plain text and takes one message"):
        _render(made, two, embedgrad_prompt="t")
    assert _render(made, two[:1], embedgrad_prompt="t") == "<T>one"
    with pytest.raises(ExportError, match="needs a chat template, and the model has none"):
        chat_template([Placed("a", user, "<A>")], None)
    alone = chat_template([Placed("t", Template.text("{query}: {prompt}"), "<T>")], None, bos="<s>")
    assert _render(alone, two[:1]) == "<s>one: <T>"
    with pytest.raises(TemplateError, match="the model has no chat template"):
        _render(alone, two[:1], embedgrad_prompt="none")


def _render(source: str, messages: list[dict[str, str]], **variables: Any) -> str:
    if any(not isinstance(message["content"], str) for message in messages):
        template = compile_chat_template(source)
        template._usage.begin(100)
        try:
            return template._template.render(messages=messages, add_generation_prompt=True, **variables)
        except jinja2.TemplateError as error:
            raise TemplateError(str(error)) from error
    return compile_chat_template(source).render(messages, {}, add_generation_prompt=True, variables=variables)
