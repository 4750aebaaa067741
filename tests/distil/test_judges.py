"""The judge at an address: right and wrong answers, retries, timeouts, and failures that no retry mends."""

from __future__ import annotations

from typing import Any

import pytest

from embedgrad.data.example import Example
from embedgrad.distil.judges import LocalJudge, RemoteJudge
from embedgrad.distil.openai_client import RETRIES, Client, Unanswered, connect
from embedgrad.engine.model import load_model
from embedgrad.evaluation.evaluate import evaluate
from embedgrad.evaluation.grading.labels import Exact
from embedgrad.prompt.prompt import SYSTEM_TURN, SoftPrompt
from embedgrad.prompt.template import Template
from embedgrad.util.errors import ModelError
from tests.distil.fake_openai import Reply, said, server
from tests.train.training import model_folder

EXAMPLES = [Example(f"film {i}", "good" if i % 2 else "bad") for i in range(20)]
CHAT = Template.chat([{"role": "system", "content": "{prompt}"}, {"role": "user", "content": "{query}"}])


def truth(body: dict[str, Any]) -> str:
    """What a perfect judge would answer."""
    return "good" if int(body["messages"][-1]["content"].split()[-1]) % 2 else "bad"


def judge(address: str, template: Template = CHAT, **changes: Any) -> RemoteJudge:
    """A judge that never waits between its attempts."""
    settings: dict[str, Any] = {"model": "judge", "pause": lambda seconds: None, **changes}
    return RemoteJudge(Client(address, **settings), template, Exact(("good", "bad")), 5)


def test_answers_are_graded_in_their_order() -> None:
    with server(lambda body, number: said(f" {truth(body).title()}.\n")) as (address, asked):
        assert judge(address, key="s3cret").ask("Judge it.", EXAMPLES) == [True] * 20
    assert len(asked) == 20
    assert {one["key"] for one in asked} == {"Bearer s3cret"}
    assert asked[0]["path"] == "/v1/chat/completions"
    assert asked[0]["messages"][0] == {"role": "system", "content": "Judge it."}
    assert (asked[0]["temperature"], asked[0]["max_tokens"], asked[0]["model"]) == (0, 5, "judge")
    with server(lambda body, number: said("good" if number % 2 else None)) as (address, _):
        assert None not in judge(address).ask("Judge it.", EXAMPLES)  # an empty answer is an answer


def test_a_text_template_asks_for_a_completion() -> None:
    reply = (200, {"choices": [{"text": " good"}]}, {})
    with server(lambda body, number: reply) as (address, asked):
        judge(address, Template.text("{prompt}\n{query}\n")).ask("Judge it.", EXAMPLES[:1])
    assert (asked[0]["path"], asked[0]["prompt"]) == ("/v1/completions", "Judge it.\nfilm 0\n")


def test_requests_that_failed_for_now_are_repeated() -> None:
    failed: set[str] = set()
    waits: list[float] = []

    def reply(body: dict[str, Any], number: int) -> Reply:
        query = body["messages"][-1]["content"]
        if query not in failed:
            failed.add(query)
            n = int(query.split()[-1])
            return [(429, {}, {"Retry-After": "7"}), (503, b"busy", {}), (200, b"<html>", {})][n % 3]
        return said(truth(body))

    with server(reply) as (address, asked):
        assert judge(address, pause=waits.append).ask("Judge it.", EXAMPLES) == [True] * 20
    assert len(asked) == 40
    assert sorted(set(waits)) == [1.0, 7.0]


def test_an_item_that_stays_without_an_answer_is_not_counted_as_wrong() -> None:
    def reply(body: dict[str, Any], number: int) -> Reply:
        return (500, {}, {}) if body["messages"][-1]["content"] == "film 3" else said(truth(body))

    with server(reply) as (address, asked):
        found = judge(address).ask("Judge it.", EXAMPLES)
    assert found == [True] * 3 + [None] + [True] * 16
    assert len(asked) == 20 + RETRIES


def test_a_judge_that_does_not_answer_in_time_counts_as_unanswered() -> None:
    with server(lambda body, number: None) as (address, asked), pytest.raises(Unanswered, match="no answer"):
        Client(address, "judge", timeout=0.1, pause=lambda seconds: None).answer([], 1)
    assert len(asked) == 1 + RETRIES


def test_a_judge_that_is_gone_ends_the_asking_with_a_sentence() -> None:
    with server(lambda body, number: (502, {}, {})) as (address, asked), pytest.raises(ModelError) as refusal:
        judge(address).ask("Judge it.", EXAMPLES)
    assert "gave no answer to 16 requests in a row (status 502)" in str(refusal.value)
    assert len(asked) == 16 * (1 + RETRIES)


def test_an_address_where_nobody_listens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedgrad.distil.openai_client.RETRIES", 0)
    with pytest.raises(ModelError, match="does not answer"):
        connect("http://127.0.0.1:9/v1", None, None, 0.2)


@pytest.mark.parametrize(
    ("status", "told"),
    [(401, "the key is missing or wrong"), (404, "no such address or model"), (400, "the request is refused")],
)
def test_what_no_retry_mends_is_refused_at_once(status: int, told: str) -> None:
    body = {"error": {"message": "no"}}
    with server(lambda _, number: (status, body, {})) as (address, asked), pytest.raises(ModelError) as refusal:
        judge(address, key="s3cret").ask("Judge it.", EXAMPLES[:1])
    assert f"answers {status}" in str(refusal.value)
    assert told in str(refusal.value)
    assert "s3cret" not in str(refusal.value)
    assert len(asked) == 1


def test_the_only_model_at_an_address_needs_no_name() -> None:
    with server(lambda body, number: said("")) as (address, _):
        assert connect(address, None, None).model == "judge"
    with (
        server(lambda body, number: said(""), ("one", "two")) as (address, _),
        pytest.raises(ModelError, match=r"has 2 models \(one, two\); choose one with --judge-model"),
    ):
        connect(address, None, None)
    with pytest.raises(ModelError, match="is no address"):
        connect("http:///v1", None, None)


def test_a_local_judge_answers_as_an_evaluation_of_its_own_does() -> None:
    other = load_model(model_folder(), device="cpu")
    found = LocalJudge(other, CHAT, ("good", "bad"), None, Exact(("good", "bad"))).ask("Judge it.", EXAMPLES)
    prompt = SoftPrompt.from_text(other, "Judge it.", SYSTEM_TURN)
    assert found == evaluate(other, prompt, EXAMPLES, ("good", "bad")).correct("generated_accuracy")
    assert LocalJudge(other, CHAT, None, None, Exact()).ask("Say <|im_end|>.", EXAMPLES[:2]) == [None, None]
