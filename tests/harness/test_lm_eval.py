"""lm-evaluation-harness on our engine, beside the harness' own model on an exported copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import embedgrad
from embedgrad.util.errors import DataError, TrainingError
from tests.exports.shared import TEMPLATES, tiny_folder, tuned

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from embedgrad.harness.lm_eval_model import EmbedGradLM

QUERIES = ["a joy", "what a bore of 2 hours", "a waste: time, money"]


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.mark.parametrize("place", ["system", "user after", "twice"])
def test_scores_and_answers_are_those_of_an_exported_copy(folder: Path, tmp_path: Path, place: str) -> None:
    """The harness asks its own model on the copy and ours on the original the same."""
    prompt = tuned(folder, TEMPLATES[place])
    embedgrad.export(prompt, to="hf", model=folder, out=tmp_path / "copy", check=False)
    ours = EmbedGradLM(str(folder), prompt)
    theirs = HFLM(pretrained=str(tmp_path / "copy"), device="cpu", dtype="float32", batch_size=2)
    chats = [[{"role": "user", "content": query}] for query in QUERIES]
    texts = [(ours.apply_chat_template(chat), theirs.apply_chat_template(chat)) for chat in chats]
    scored = []
    for lm, side in ((ours, 0), (theirs, 1)):
        asked = [(text[side], label) for text in texts for label in (" yes", " not at all")]
        scored.append(lm.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True))
    for (mine, greedy), (right, exact) in zip(*scored, strict=True):
        assert mine == pytest.approx(right, abs=2e-4)
        assert greedy == exact
    options = {"until": ["\n\n\n"], "max_gen_toks": 8, "do_sample": False}
    answers = []
    for lm, side in ((ours, 0), (theirs, 1)):
        asked = [(text[side], options) for text in texts]
        answers.append(lm.generate_until(instances("generate_until", asked), disable_tqdm=True))
    assert answers[0] == answers[1]


def test_a_context_without_a_mark_is_a_query(folder: Path) -> None:
    model = embedgrad.load_model(folder)
    prompt = tuned(folder)
    lm = EmbedGradLM(model, prompt)
    answers = lm.generate_until(instances("generate_until", [(query, {"max_gen_toks": 6}) for query in QUERIES]))
    right = embedgrad.generate(model, prompt, QUERIES, embedgrad.Sampling(max_new_tokens=6))
    assert answers == [answer.text for answer in right]
    scores = lm.loglikelihood(instances("loglikelihood", [(query, "yes") for query in QUERIES]))
    chats = [lm.apply_chat_template([{"role": "user", "content": query}]) for query in QUERIES]
    assert scores == lm.loglikelihood(instances("loglikelihood", [(chat, "yes") for chat in chats]))
    with pytest.raises(DataError, match="loglikelihood_rolling"):
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("a text",)]))


def test_whole_texts_of_the_bare_model(folder: Path) -> None:
    """Also texts that are longer than the context, in windows."""
    ours = EmbedGradLM(str(folder), max_length=16)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", max_length=16)
    asked = instances("loglikelihood_rolling", [("a joy",), ("what a bore " * 12,)])
    right = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(right, abs=1e-3)


def test_a_context_that_is_too_long_keeps_the_prompt(folder: Path) -> None:
    lm = EmbedGradLM(str(folder), tuned(folder), max_length=64)
    asked = instances("generate_until", [("word " * 300, {"max_gen_toks": 4})])
    with pytest.warns(UserWarning, match="has lost"):
        assert len(lm.generate_until(asked)) == 1
    rendered = lm._context("word " * 300, 4)
    assert len(rendered.ids) == 60
    assert max(rendered.prompt_rows) == len(lm._served.prompt.token_ids) - 1  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_command_runs_a_task_of_ones_own(folder: Path, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    lines = [{"q": query, "a": "good"} for query in QUERIES]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'data.json'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: [bad, good]\n"
        "doc_to_target: '{{a}}'\nmetric_list: [{metric: acc}]\n"
    )
    tuned(folder).save(tmp_path / "prompt.safetensors")
    command = [sys.executable, "-m", "embedgrad", "lm-eval", "--include_path", str(tmp_path), "--tasks", "own"]
    arguments = f"model={folder},prompt={tmp_path / 'prompt.safetensors'}"
    done = subprocess.run(
        [*command, "--model_args", arguments, "--apply_chat_template"], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "acc" in done.stdout


def test_a_likelihood_that_is_not_finite_is_an_error(folder: Path) -> None:
    lm = EmbedGradLM(embedgrad.load_model(folder), tuned(folder))
    lm._served.embeddings.fill_(float("nan"))
    with pytest.raises(TrainingError, match="request 0 has a log-likelihood that is not finite"):
        lm.loglikelihood(instances("loglikelihood", [("a joy", "yes")]))
