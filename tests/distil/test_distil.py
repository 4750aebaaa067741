"""`embedgrad distil` from a tuned prompt to the files: budgets, resuming, refusals, warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.cli.commands import distil as command
from embedgrad.cli.commands.distil import Options, run
from embedgrad.cli.commands.optimize import run as optimize
from embedgrad.distil.candidates import clean
from embedgrad.distil.distil import SOFT, SOURCES, Distillation, Settings
from embedgrad.distil.ledger import FILE, Ledger
from embedgrad.distil.result import rows
from embedgrad.engine.model import load_model
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.util.errors import ConfigError
from embedgrad.util.folder_lock import locked
from tests.compare.test_compare import configure
from tests.distil.fake_openai import said, server
from tests.train.training import model_folder

QUICK = Settings(samples=2, budget=60_000, longest=12, batch_size=4, top=2)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt in the folder of its run."""
    folder = tmp_path_factory.mktemp("distil")
    assert optimize(configure(folder, optimize__learning_rate=0.05), [], None, False, True, False) == 0
    return folder / "runs/small/prompt.safetensors"


def distilled(prompt: Path, folder: Path, chosen: Settings = QUICK, **options: Any) -> dict[str, Any]:
    """Runs the command. Returns the contents of distil.json."""
    assert run(prompt, Options(output=folder, quiet=True, **options), chosen) == 0
    found = json.loads((folder / "distil.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def found(tuned: Path) -> dict[str, Any]:
    """What all sources together come to, with a judge at an address that always says "good"."""
    with server(lambda body, number: said("good")) as (address, _):
        return distilled(tuned, tuned.parent / "all", judge=address)


def test_every_source_gives_texts_and_the_budget_is_kept(tuned: Path, found: dict[str, Any]) -> None:
    sources = {one["source"].split(":")[0].split(",")[0].removesuffix(" from the best candidate")
               for one in found["texts"]}  # fmt: skip
    assert {"the original text", "nearest tokens", "own words"} <= sources
    assert sources & {"gcg", "gcg-fluent", "pez", "pez-fluent"}
    assert sum(found["spent"].values()) <= found["budget"] == 60_000
    assert all(value > 0 for value in found["spent"].values())
    model = load_model(model_folder(), device="cpu")
    prompt = SoftPrompt.load(tuned, model)
    for one in found["texts"]:
        again = SoftPrompt.from_text(model, one["text"], prompt.template)
        assert len(again.token_ids) == one["tokens"]
        assert one["perplexity"] > 1
    ledger = Ledger(tuned.parent / "all", {})
    for name, state in ledger.searches.items():
        spent = state.spent + sum(one["spent"] for one in ledger.scores.values() if one["source"] == name)
        assert spent <= 60_000 / 8


def test_the_judge_decides_about_the_order(found: dict[str, Any]) -> None:
    judged = [one for one in found["texts"] if "judge" in one]
    assert judged
    assert len({one["judge"]["accuracy"]["value"] for one in judged}) == 1
    assert found["judge"].startswith("judge at http://127.0.0.1")
    assert found["texts"][: len(judged)] == judged


def test_a_gain_within_its_interval_is_a_warning_and_has_no_shares(found: dict[str, Any]) -> None:
    gain = found["gain"]["test"]["generated_accuracy"]
    assert gain["low"] <= 0
    told = [warning for warning in found["warnings"] if "there may be nothing to distil" in warning]
    assert len(told) == len({"validation", "test"})  # one for each part, with the measures that it is about
    assert "on the test items is not above 0 by answer as generated (" in told[-1]
    assert "100 %" not in rows(found)[0]
    assert all("generated_accuracy" not in one["share"] for one in found["texts"])


def test_the_files_say_the_same(tuned: Path, found: dict[str, Any]) -> None:
    folder = tuned.parent / "all"
    assert (folder / "best.txt").read_text() == found["texts"][0]["text"] + "\n"
    page = (folder / "distil.md").read_text()
    assert f"{len(found['texts'])} texts were scored on 4 validation items" in page
    assert found["texts"][0]["source"] in page


def test_a_distillation_that_was_stopped_goes_on_to_the_same_result(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Settings(("nearest", "words", "gcg", "pez"), 2, 30_000, longest=12, batch_size=4)
    whole = distilled(tuned, tmp_path / "whole", chosen)
    pieces, original = 0, Distillation.pieces

    class Killed(Exception):
        pass

    def cut_off(self: Distillation) -> Any:
        for number, piece in enumerate(original(self)):
            if number == 3:
                raise Killed
            yield piece

    monkeypatch.setattr(Distillation, "pieces", cut_off)
    while True:
        try:
            distilled(tuned, tmp_path / "cut", chosen)
            break
        except Killed:
            pieces += 1
    assert pieces > 3
    assert json.loads((tmp_path / "cut/distil.json").read_text()) == whole


def test_two_processes_do_not_share_a_folder(tuned: Path, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match=r"another process is working in .*; wait for it or choose"):
        run(tuned, Options(output=tmp_path, quiet=True), QUICK)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_another_prompt_or_seed_needs_another_folder(tuned: Path, tmp_path: Path) -> None:
    chosen = Settings(("nearest",), 1, 30_000)
    distilled(tuned, tmp_path, chosen)
    with pytest.raises(ConfigError, match="holds a distillation with another settings; give another --output"):
        distilled(tuned, tmp_path, Settings(("nearest",), 1, 30_000, seed=5))
    more = distilled(tuned, tmp_path, Settings(("nearest", "pez"), 1, 60_000, batch_size=8))
    assert any(one["source"] == "pez" for one in more["texts"])
    (tmp_path / FILE).write_bytes(b"not a file of ours")
    with pytest.raises(ConfigError, match="cannot be read"):
        distilled(tuned, tmp_path, chosen)


def test_what_cannot_be_done_is_refused_in_a_sentence(tuned: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(tuned.read_bytes())
    with pytest.raises(ConfigError, match=r"there is no configuration beside .* give one with --config"):
        distilled(alone, tmp_path / "out")
    config = tuned.parents[2] / "small.yaml"
    assert distilled(alone, tmp_path / "out", Settings(("nearest",), 1, 30_000), config=config)["texts"]
    with pytest.raises(ConfigError, match="needs validation data"):
        distilled(tuned, tmp_path / "no", overrides=["data.split.validation=0"])
    with pytest.raises(ConfigError, match=r"the budget of 10 tokens does not pay .* give at least"):
        distilled(tuned, tmp_path / "no", Settings(budget=10))
    with pytest.raises(ConfigError, match="no source 'gradient'; choose among nearest, words, induced, gcg"):
        Settings(("gradient",))
    with pytest.raises(ConfigError, match="--judge-model names a model at an address"):
        distilled(tuned, tmp_path / "no", judge_model="x")
    assert command.beside(Path("a/prompt.safetensors"), "distil") == Path("a/distil")
    assert command.beside(Path("a/mine.safetensors"), "distil") == Path("a/mine-distil")
    assert SOFT not in SOURCES


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ('"Say what it is."', "Say what it is."),
        ("Here is the instruction:\n\n“Name the mood.”\n\nI hope that this helps!", "Name the mood."),
        ("Instruction:\nSay\ngood or bad.", "Say good or bad."),
        ("One. Two is cut", "One. Two is cut"),
        ("", ""),
        ("Only this:", "Only this:"),
    ],
)
def test_an_answer_becomes_an_instruction(answer: str, text: str) -> None:
    assert clean(answer) == text


@given(st.text())
@settings(deadline=None)
def test_cleaning_never_fails_and_ends_where_it_is_clean(answer: str) -> None:
    assert "\n" not in clean(answer)
    assert len(clean(answer, cut_off=True)) <= len(answer)
    assert clean("One. Two is cut", cut_off=True) == "One."
