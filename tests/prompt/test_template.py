"""Templates: slots, refusals, and their JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedgrad.prompt.template import Template
from embedgrad.util.errors import TemplateError
from tests.prompt.fake_model import CHAT_TEMPLATES

SYSTEM = {"role": "system", "content": "{prompt}"}
USER = {"role": "user", "content": "{query}"}
TEXT = st.text(st.sampled_from(list("ab {}<>\n\t'\"é漢😀|%#-")), max_size=12)


def test_slots_are_exact_and_replaced_in_one_pass() -> None:
    template = Template.text(r"{prompt} x{{prompt}} \boxed{} {'a': 1} {Query} {query}{query}")
    assert template.fill("<{query}>", "<{prompt}>") == (
        r"<{query}> x{<{query}>} \boxed{} {'a': 1} {Query} <{prompt}><{prompt}>"
    )


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([SYSTEM], r"\{query\} is missing from the messages"),
        ([USER], r"\{prompt\} is missing from the messages"),
        ([{"role": "user", "content": "hello"}], r"\{prompt\} and \{query\} are missing"),
        ([], "at least one message"),
        ([SYSTEM, USER, {"role": "assistant", "content": "yes"}], "last message must not be the assistant's"),
        ([SYSTEM, {"role": "human", "content": "{query}"}], "message 2 has the role 'human'; allowed roles are system"),
        ([SYSTEM, {"role": ["user"], "content": "{query}"}], "message 2 has the role"),
        ([SYSTEM, {"role": "user", "content": ["{query}"]}], r"message 2 \(user\) has no text"),
        ([SYSTEM, {"role": "user"}], r"message 2 \(user\) has no text"),
        ([SYSTEM, "{query}"], "message 2 must be an object"),
        ([SYSTEM, {**USER, "name": "x"}], "message 2 has the field 'name'"),
        ("{prompt}{query}", "must be a list of messages, not str"),
        (None, "must be a list of messages, not NoneType"),
    ],
)
def test_chat_refusals(messages: object, said: str) -> None:
    with pytest.raises(TemplateError, match=said) as raised:
        Template.chat(messages)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("body", "said"), [("{query}", r"\{prompt\} is missing"), (3, "must be text, not int")])
def test_text_refusals(body: object, said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        Template.text(body)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variables", "said"),
    [({"messages": []}, "'messages' cannot be given"), ({"x": {1, 2}}, "JSON values"), ({1: 2}, "names as keys")],
)
def test_variables_refusals(variables: object, said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        Template.chat([SYSTEM, USER], variables=variables)  # type: ignore[arg-type]


def test_a_chat_template_that_is_not_jinja_is_refused_when_the_template_is_made() -> None:
    with pytest.raises(TemplateError, match="line 2 of the chat template is not Jinja"):
        Template.chat([SYSTEM, USER], chat_template="{{ bos_token }}\n{% for x in %}")


@given(TEXT, TEXT, st.booleans(), st.dictionaries(TEXT, st.integers() | TEXT | st.none(), max_size=2))
def test_json_round_trip(one: str, other: str, end: bool, variables: dict[str, object]) -> None:
    messages = [{"role": "system", "content": one + " {prompt}"}, {"role": "user", "content": other + " {query}"}]
    for template in (
        Template.plain(),
        Template.text(one + " {prompt}" + other + " {query}", end=end),
        Template.chat(messages),
        Template.chat(messages, CHAT_TEMPLATES["llama3"], variables),
    ):
        again = Template.from_json(template.to_json())
        assert again == template
        assert hash(again) == hash(template)
        assert Template.from_json(json.loads(template.to_json())) == template


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=8)
        | st.sampled_from(["chat", "text", "{prompt}{query}"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["kind", "messages", "role", "content", "text", "end", "chat_template", "variables", "x"]
                ),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_from_json_gives_a_template_or_a_template_error(value: object) -> None:
    for source in (value, json.dumps(value)):
        try:
            template = Template.from_json(source)  # type: ignore[arg-type]
        except TemplateError:
            continue
        assert Template.from_json(template.to_json()) == template


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{", "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
        ('{"kind": "poem"}', "must be chat, text or plain, not 'poem'"),
        ('{"kind": "plain", "end": true}', "plain template has no field 'end'"),
        ('{"kind": "text", "text": "{prompt}{query}", "end": 1}', "must be true or false"),
    ],
)
def test_from_json_refusals(source: str, said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        Template.from_json(source)
