"""`embedgrad serve` in its own process: answers, streams, refusals, and clients that vanish."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embedgrad
from embedgrad.serve.bodies import ChatBody, CompletionBody
from tests.serve.shared import Running, running

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("serve"), "--slots", "8", "--max-waiting", "64") as found:
        yield found


@pytest.fixture(scope="module")
def engine(server: Running) -> tuple[embedgrad.Model, dict[str, embedgrad.SoftPrompt]]:
    model = embedgrad.load_model(server.model)
    return model, {name: embedgrad.SoftPrompt.load(path, model) for name, path in server.prompts.items()}


def wanted(engine: Any, name: str, query: str, n: int = 1, **sampling: Any) -> list[embedgrad.Generation]:
    model, prompts = engine
    return embedgrad.generate(model, prompts[name], [query] * n, embedgrad.Sampling(**sampling))


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_answers_are_those_of_generate_for_many_clients_at_once(server: Running, engine: Any) -> None:
    """Prompts, queries and settings are mixed; each client compares its own answer."""
    names = list(server.prompts)
    cases = [
        (names[i % 3], f"review number {i % 7} is a bore", {"temperature": 0.8 * (i % 2), "seed": i}) for i in range(48)
    ]

    def ask(case: tuple[str, str, dict[str, Any]]) -> Any:
        name, query, sampling = case
        return server.chat(name, query, max_tokens=12, n=1 + sampling["seed"] % 2, **sampling)

    with ThreadPoolExecutor(24) as clients:
        for (name, query, sampling), answer in zip(cases, clients.map(ask, cases), strict=True):
            right = wanted(engine, name, query, 1 + sampling["seed"] % 2, max_new_tokens=12, **sampling)
            assert [choice["message"]["content"] for choice in answer["choices"]] == [r.text for r in right]
            assert answer["usage"]["completion_tokens"] == sum(len(r.log_probabilities) for r in right)
            assert answer["model"] == name


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_stream_has_the_text_of_the_whole_answer(server: Running, engine: Any, kind: str) -> None:
    fields = {"max_tokens": 20, "temperature": 1.0, "seed": 3, "n": 2, "logprobs": True if kind == "chat" else 1}
    query = "hello world"
    body = {"prompt": query} if kind == "completion" else {"messages": [{"role": "user", "content": query}]}
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    asked = {"model": "system", **body, **fields, "stream": True, "stream_options": {"include_usage": True}}
    got = events(server.post(path, asked))
    right = wanted(engine, "system", query, 2, max_new_tokens=20, temperature=1.0, seed=3)
    texts, counts, ends = ["", ""], [0, 0], ["", ""]
    for event in got[:-1]:
        choice = event["choices"][0]
        at = choice["index"]
        texts[at] += choice["text"] if kind == "completion" else choice["delta"].get("content", "")
        shown = choice["logprobs"]
        counts[at] += len(shown["content"] if kind == "chat" else shown["tokens"])
        ends[at] = choice["finish_reason"] or ends[at]
    assert texts == [r.text for r in right]
    assert counts == [len(r.ids) for r in right]
    assert ends == [{"stop": "stop"}.get(r.stop_reason, "length") for r in right]
    assert got[-1]["usage"]["completion_tokens"] == sum(len(r.log_probabilities) for r in right)


def test_settings_belong_to_the_request(server: Running, engine: Any) -> None:
    query = "a fine film"
    whole = wanted(engine, "system", query, max_new_tokens=16)[0]
    stop = whole.text[3:5]
    answer = server.chat("system", query, max_tokens=16, stop=[stop])["choices"][0]
    assert answer["message"]["content"] == whole.text[: whole.text.index(stop)]
    banned = whole.ids[0]
    biased = server.chat("system", query, max_tokens=16, logit_bias={str(banned): -1e9})["choices"][0]
    right = wanted(engine, "system", query, max_new_tokens=16, logit_bias={banned: -1e9})[0]
    assert biased["message"]["content"] == right.text
    forced = server.chat("system", query, guided_choice=["yes", "no"])["choices"][0]["message"]["content"]
    assert forced == wanted(engine, "system", query, choices=("yes", "no"))[0].text
    schema = {"type": "object", "properties": {"label": {"enum": ["good", "bad"]}}, "required": ["label"]}
    shape = {"type": "json_schema", "json_schema": {"name": "label", "schema": schema}}
    told = server.chat("bare", query, response_format=shape)["choices"][0]["message"]["content"]
    assert json.loads(told)["label"] in ("good", "bad")


def test_log_probabilities_are_those_of_generate(server: Running, engine: Any) -> None:
    right = wanted(engine, "system", "a fine film", max_new_tokens=6)[0]
    answer = server.chat("system", "a fine film", max_tokens=6, logprobs=True, top_logprobs=3)["choices"][0]
    shown = answer["logprobs"]["content"]
    assert [t["logprob"] for t in shown] == pytest.approx(right.log_probabilities[: len(right.ids)], abs=1e-4)
    assert all(len(t["top_logprobs"]) == 3 and t["top_logprobs"][0]["token"] == t["token"] for t in shown)
    assert all(t["top_logprobs"][0]["logprob"] == pytest.approx(t["logprob"], abs=1e-4) for t in shown)


def test_cached_tokens_and_conversations(server: Running) -> None:
    first = server.chat("system", "one")["usage"]
    assert 0 < first["prompt_tokens_details"]["cached_tokens"] < first["prompt_tokens"]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "bore"}]},
        {"role": "assistant", "content": "bad", "tool_calls": None},
        {"role": "user", "content": "a joy"},
    ]
    for model in ("system", "user-after", "bare"):
        response = server.post("/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 4})
        assert response.status_code == 200, response.text
    refused = server.post("/v1/chat/completions", {"model": "text", "messages": messages})
    assert refused.status_code == 400
    assert "plain text" in refused.json()["error"]["message"]


_USER = [{"role": "user", "content": "x"}]
_PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
WRONG = {
    "no model": ({"messages": _USER}, 400, "model is missing"),
    "another model": ({"model": "gpt", "messages": _USER}, 404, "there is no model 'gpt'"),
    "no messages": ({"model": "system", "messages": []}, 400, "messages"),
    "empty query": ({"model": "system", "messages": [{"role": "user", "content": " "}]}, 400, "the query is empty"),
    "a role": ({"model": "system", "messages": [{"role": "judge", "content": "x"}]}, 400, "messages.0.role"),
    "a picture": ({"model": "system", "messages": _PICTURE}, 400, "messages.0.content"),
    "temperature": ({"model": "bare", "messages": _USER, "temperature": -1}, 400, "temperature"),
    "unknown": ({"model": "bare", "messages": _USER, "mirostat": 2}, 400, "mirostat is not understood"),
    "tools": ({"model": "bare", "messages": _USER, "tools": [{}]}, 400, "tools"),
    "bias": ({"model": "bare", "messages": _USER, "logit_bias": {"99999": 1}}, 400, "99999"),
    "too long": ({"model": "bare", "messages": [{"role": "user", "content": "word " * 9000}]}, 400, "shorten it"),
    "surrogate": ({"model": "bare", "messages": [{"role": "user", "content": "\ud800"}]}, 400, ""),
    "schema": (
        {
            "model": "bare",
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string"}}},
        },
        400,
        "the JSON schema",
    ),
    "schema is missing": (
        {"model": "bare", "messages": _USER, "response_format": {"type": "json_schema"}},
        400,
        "json_schema is missing",
    ),
    "an unknown format": (
        {"model": "bare", "messages": _USER, "response_format": {"type": "json_object"}},
        400,
        "response_format",
    ),
    "prompt variable": (
        {
            "model": "system",
            "messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
            "chat_template_kwargs": {"embedgrad_prompt": "none"},
        },
        400,
        "embedgrad_prompt",
    ),
}


def test_a_whole_number_may_have_a_point(server: Running) -> None:
    """JSON has one type of number; 3.5 is still refused where a whole one is meant."""
    body = {"model": "bare", "prompt": [5.0, 6], "max_tokens": 3.0, "top_k": 0.0, "seed": 1.0, "logprobs": 1.0}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    assert response.json() == {
        **server.post("/v1/completions", {**body, "prompt": [5, 6], "max_tokens": 3, "seed": 1}).json(),
        **{name: response.json()[name] for name in ("id", "created")},
    }
    for name in ("max_tokens", "seed"):
        assert name in server.post("/v1/completions", {**body, name: 3.5}).json()["error"]["message"]
    for field, value in (("prompt", [[-521]]), ("echo", 0)):
        refused = server.post("/v1/completions", {**body, field: value})
        assert (refused.status_code, field in refused.json()["error"]["message"]) == (400, True)
    empty = server.post("/v1/completions", {**body, "prompt": ""})
    assert (empty.status_code, "prompt" in empty.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_gets_one_sentence(server: Running, name: str) -> None:
    body, status, words = WRONG[name]
    headers = {"content-type": "application/json"}
    content = json.dumps(body).encode()
    response = httpx.post(f"{server.address}/v1/chat/completions", content=content, headers=headers, timeout=60)
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    assert words in message
    assert "\n" not in message


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("system"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_FIELDS = [*ChatBody.model_fields, *CompletionBody.model_fields, "content"]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=6), st.booleans())
def test_no_body_fells_the_server(server: Running, fields: dict[str, Any], chat: bool) -> None:
    body = {"model": "system", "max_tokens": 2, **({"messages": [{"role": "user", "content": "x"}]} if chat else {})}
    content = json.dumps({**body, **fields}).encode()
    path = "/v1/chat/completions" if chat else "/v1/completions"
    response = httpx.post(
        server.address + path, content=content, headers={"content-type": "application/json"}, timeout=60
    )
    assert response.status_code in (200, 400, 404, 429)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"a":' * 50_000, b"\x1f\x8b" + b"0" * 100, b'{"model": "\\ud800"}',
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(server: Running, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.address}/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "recursion" not in message
    assert "sys." not in message


def test_other_refusals(server: Running) -> None:
    get = httpx.get
    assert httpx.post(f"{server.address}/v1/completions", content=b"x=1").status_code == 415
    assert get(f"{server.address}/nothing").status_code == 404
    assert get(f"{server.address}/v1/completions").status_code == 405
    assert get(f"{server.address}/v1/models/{'x' * 300}").status_code == 404
    assert get(f"{server.address}/v1/models", headers={"host": "evil.example"}).status_code == 403
    big = b'{"model": "' + b"x" * (1 << 20) + b'"}'
    headers = {"content-type": "application/json"}
    assert httpx.post(f"{server.address}/v1/completions", content=big, headers=headers).status_code == 413


def _quiet(server: Running) -> bool:
    for _ in range(100):
        if not server.gauge("embedgrad_answers_running") and not server.gauge("embedgrad_answers_waiting"):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("stream", [True, False])
def test_the_answers_of_a_client_that_goes_end(server: Running, engine: Any, stream: bool) -> None:
    """Sixteen clients close their sockets in the midst of long answers; a seventeenth gets its own answer."""
    never = [str(i) for i in range(4)]
    body = {"model": "bare", "prompt": "go on", "max_tokens": 3000, "stream": stream, "temperature": 1.0, "stop": never}
    content = json.dumps({**body, "logit_bias": {"0": -1e9, "1": -1e9, "2": -1e9}}).encode()
    host, port = server.address.removeprefix("http://").split(":")
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode() + content
    sockets = [socket.create_connection((host, int(port))) for _ in range(16)]
    for each in sockets:
        each.sendall(request)
    time.sleep(0.3)
    for each in sockets:
        each.close()
    right = wanted(engine, "system", "still there", max_new_tokens=8)[0]
    assert server.chat("system", "still there", max_tokens=8)["choices"][0]["message"]["content"] == right.text
    assert _quiet(server)


def test_more_answers_than_may_wait_are_refused(server: Running) -> None:
    """For the moment where others wait, and for good where the request alone asks for too many."""
    body = {"model": "bare", "prompt": ["go on"] * 4, "n": 16, "max_tokens": 200, "logit_bias": {"0": -1e308}}
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: server.post("/v1/completions", body), range(8)))
    codes = [response.status_code for response in answers]
    assert set(codes) == {200, 429}
    assert answers[codes.index(429)].headers["retry-after"] == "1"
    alone = server.post("/v1/completions", {**body, "prompt": ["go on"] * 20})
    assert alone.status_code == 400
    assert "asks for 320 answers, and at most 64 may wait" in alone.json()["error"]["message"]
    assert _quiet(server)


def test_models_health_metrics_and_document(server: Running) -> None:
    ids = [each["id"] for each in httpx.get(f"{server.address}/v1/models").json()["data"]]
    assert ids == [*server.prompts, "bare"]
    assert httpx.get(f"{server.address}/v1/models/bare").json()["object"] == "model"
    assert httpx.get(f"{server.address}/health").json() == {"status": "ok"}
    assert 'embedgrad_requests_total{model="system",status="200"}' in httpx.get(f"{server.address}/metrics").text
    paths = httpx.get(f"{server.address}/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions"} <= set(paths)


def test_a_key_is_asked_for(tmp_path: Any) -> None:
    with running(tmp_path, "--api-key", "secret", "--max-body", "300") as found:
        url = f"{found.address}/v1/models"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"authorization": "Bearer secret2"}).status_code == 401
        right = {"authorization": "Bearer secret"}
        assert httpx.get(url, headers={**right, "host": "proxy.example"}).status_code == 200
        assert httpx.get(f"{found.address}/health").status_code == 200
        body = {"model": "bare", "prompt": "x" * 400}
        assert found.post("/v1/completions", body, headers=right).status_code == 413
