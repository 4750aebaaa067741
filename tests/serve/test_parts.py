"""Parts of the server alone: text that can be sent, finite JSON schemas, and how conversations become tokens."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embedgrad
from embedgrad.cli.app import app
from embedgrad.prompt.rendering import render_query
from embedgrad.serve.finite_schema import texts_of
from embedgrad.serve.run import Settings, serve
from embedgrad.serve.served import ServedModel
from embedgrad.serve.text_stream import TextStream
from embedgrad.util.errors import DataError
from tests.exports.shared import TEMPLATES, tiny_folder, tuned


@pytest.fixture(scope="module", params=["llama", "qwen2", "mistral"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> embedgrad.Model:
    return embedgrad.load_model(folder)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_pieces_of_a_text_are_the_text(model: embedgrad.Model, data: st.DataObject) -> None:
    """Also where tokens hold parts of characters, and up to the first stop text only."""
    text = data.draw(st.text(st.sampled_from("ab é日本😀\n "), min_size=1, max_size=20))
    ids = model.tokenizer.encode(text) or [5]
    stops = data.draw(st.lists(st.text(st.sampled_from("ab é日\n"), min_size=1, max_size=3), max_size=2))
    stream = TextStream(model.tokenizer, stops)
    pieces = []
    for count, id in enumerate(ids, 1):  # as in generation, an answer ends with the token that completes a stop text
        pieces.append(stream.add(id))
        answer = model.tokenizer.decode(ids[:count])
        places = [at for at in (answer.find(stop) for stop in stops) if at >= 0]
        if places:
            answer = answer[: min(places)]
            break
    assert answer.startswith("".join(pieces))
    assert "".join(pieces) + stream.end(answer) == answer


SCHEMAS: list[tuple[Any, list[Any]]] = [
    ({"enum": ["a", 1, None]}, ["a", 1, None]),
    ({"const": "ü"}, ["ü"]),
    ({"type": "boolean"}, [True, False]),
    ({"anyOf": [{"const": 1}, {"type": "null"}]}, [1, None]),
    ({"$defs": {"L": {"enum": ["x", "y"]}}, "$ref": "#/$defs/L"}, ["x", "y"]),
    (
        {"type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"const": "c"}}, "additionalProperties": False},
        [{"a": 1, "b": "c"}, {"a": 2, "b": "c"}],
    ),
]


@pytest.mark.parametrize(("schema", "values"), SCHEMAS)
def test_a_finite_schema_is_its_values(schema: Any, values: list[Any]) -> None:
    assert [json.loads(text) for text in texts_of(schema)] == values


@pytest.mark.parametrize(
    "schema",
    [
        {}, {"type": "string"}, {"enum": []}, {"enum": 3}, {"$ref": "#/nowhere"}, {"$ref": 3}, {"$ref": "#"}, [],
        {"enum": list(range(2000))}, {"type": "object"}, {"type": "object", "properties": {"a": {"type": "number"}}},
        {"type": "object", "properties": {str(i): {"type": "boolean"} for i in range(40)}},
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ],
)  # fmt: skip
def test_another_schema_is_refused(schema: Any) -> None:
    with pytest.raises(DataError):
        texts_of(schema)


@pytest.mark.parametrize("place", TEMPLATES)
def test_a_conversation_has_the_tokens_of_its_query(folder: Path, model: embedgrad.Model, place: str) -> None:
    """The two ways to tokens agree: by the prompt's template, and by the chat template of an exported copy."""
    prompt = tuned(folder, TEMPLATES[place])
    served = ServedModel(model, "p", prompt)
    messages = [{"role": "user", "content": "a joy of 2 hours"}]
    one, other = served.chat(messages), render_query(model, prompt, "a joy of 2 hours")
    again = served.tokens(served.text(messages, "\uf800"), "\uf800")
    assert (one.ids, one.prompt_rows) == (other.ids, other.prompt_rows)
    assert (again.ids, again.prompt_rows) == (other.ids, other.prompt_rows)


@pytest.mark.parametrize("place", [None, "system", "user before"])
def test_control_tokens_in_the_messages_are_text(folder: Path, model: embedgrad.Model, place: str | None) -> None:
    """A client cannot end its turn, or begin another, by what it writes."""
    served = ServedModel(model, "p", None if place is None else tuned(folder, TEMPLATES[place]))
    controls, tokenizer = model.tokenizer.controls, model.tokenizer

    def conversation(*texts: str) -> list[dict[str, str]]:
        return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]

    calm = served.chat(conversation("a joy", "good", "a bore"))
    for token in controls.ids:
        rendered = served.chat(conversation(f"a {token} joy", f"good{token}", f"{token}a bore"))
        assert [id for id in rendered.ids if id in controls.ids.values()] == [
            id for id in calm.ids if id in controls.ids.values()
        ]
        assert tokenizer.decode(rendered.ids, skip_special=False).count(token) >= 3
        assert [row for row in rendered.prompt_rows if row >= 0] == [row for row in calm.prompt_rows if row >= 0]


def test_who_reads_the_address_can_connect(model: embedgrad.Model) -> None:
    """The address is told when the socket listens, not before: a client under load is not turned away."""

    class Connected(Exception):
        pass

    def connect(address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        socket.create_connection((host, int(port))).close()
        raise Connected

    with pytest.raises(Connected):
        serve([ServedModel(model, "bare", None)], Settings(port=0, slots=1), connect)


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    folder = tiny_folder(tmp_path / "model")
    tuned(folder).save(tmp_path / "a.safetensors")
    command = ["serve", str(folder), str(tmp_path / "a.safetensors"), "--bare-name", "a"]
    result = CliRunner().invoke(app, command)
    assert "both called 'a'" in str(result.exception)
    wide = CliRunner().invoke(app, ["serve", str(folder), "--context", "100000000"])
    assert "--context is 100000000" in str(wide.exception)
