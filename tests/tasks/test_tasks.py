"""Tasks: what they load from a folder and from a stand-in of the hub, and how they are divided."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.data.example import Example
from embedgrad.data.splitting import text_key
from embedgrad.evaluation.grading.registry import make_grader
from embedgrad.tasks import NAMES, find_task
from embedgrad.tasks.causal_judgement import story
from embedgrad.tasks.parts import Division, cut, divide
from embedgrad.tasks.source import Source
from embedgrad.tasks.task import Pools, Task
from embedgrad.train.settings import OptimizeConfig
from embedgrad.util.errors import ConfigError, DataError
from tests.prompt.fake_model import tokenizer_of
from tests.tasks.shared import data_folder

CAUSAL = [
    (f"The clerk {n} shut gate {n} and the mail of day {n} was lost in the rain. Did he lose it?", n) for n in range(40)
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "imdb/train.jsonl": [{"text": f"Some film {n}", "label": n % 2} for n in range(40)],
    "imdb/test.jsonl": [{"text": f"other film {n}", "label": n % 2} for n in range(20)]
    + [{"text": "some FILM 3.", "label": 1}],
    "causal_judgment/bigbench.jsonl": [{"input": text, "target": ("Yes", "No")[n % 2]} for text, n in CAUSAL],
    "causal_judgment/bbh.jsonl": [
        {
            "input": "How would a typical person answer each of the following questions about causation?\n"
            + text + "\nOptions:\n- Yes\n- No",
            "target": ("Yes", "No")[n % 2],
        }
        for text, n in CAUSAL
    ],
    "math_train/train.jsonl": [
        {"problem": f"What is {n} + 1?", "solution": f"It is $\\boxed{{{n + 1}}}$."} for n in range(30)
    ]
    + [{"problem": "What?", "solution": "Nothing: $\\boxed{}$."}],
    "math500/test.jsonl": [{"problem": f"How much is {n} + 2?", "answer": str(n + 2)} for n in range(10)],
}  # fmt: skip
SMALL = {
    "imdb": {"train": 20, "validation": 4, "test": 10},
    "causal_judgement": {"train": 20, "validation": 4, "test": 10},
    "math500": {"train": 20, "validation": 4, "test": 10},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in ROWS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_every_task_is_complete(name: str) -> None:
    task = find_task(name)
    assert task.name == name
    assert task.prompt.strip() == task.prompt != ""
    assert task.sizes is not None
    assert set(task.sizes) == {"train", "validation", "test"}
    OptimizeConfig(**task.optimize)
    if task.grader != "math":
        make_grader(task.grader, task.labels)


@pytest.mark.parametrize(
    ("name", "variant"),
    [("imdb", None), ("causal_judgement", "bigbench"), ("causal_judgement", "bbh"), ("math500", None)],
)
def test_tasks_from_a_folder(folder: Path, name: str, variant: str | None) -> None:
    task = find_task(name)
    parts = divide(task, task.load(Source.of(folder), variant), Division(SMALL[name], seed=1), tokenizer_of())
    assert {"train": len(parts.train), "validation": len(parts.validation), "test": len(parts.test)} == SMALL[name]
    assert parts.leakage.clean
    again = divide(task, task.load(Source.of(folder), variant), Division(SMALL[name], seed=1), tokenizer_of())
    other = divide(task, task.load(Source.of(folder), variant), Division(SMALL[name], seed=2), tokenizer_of())
    assert (again.train, again.test) == (parts.train, parts.test)
    assert other.train != parts.train


def test_what_the_test_data_has_is_not_trained_on(folder: Path) -> None:
    """One review of the stand-in is in both files and differs in case and a full stop only."""
    task = find_task("imdb")
    parts = divide(task, task.load(Source.of(folder), None), Division({"train": 35, "validation": 4, "test": 21}))
    assert parts.leakage.left_out == 1
    assert "Some film 3" not in {example.query for example in parts.train + parts.validation}
    assert parts.leakage.shared == {"train/validation": 0, "train/test": 0, "validation/test": 0}


def test_both_variants_of_causal_judgement_are_the_bare_story(folder: Path) -> None:
    task = find_task("causal_judgement")
    one, other = (task.load(Source.of(folder), variant).train for variant in task.variants)
    assert one == other
    assert story("Q: Did it?\nA:") == story("Did it?\nchoice: Yes\nchoice: No") == story("Did it?") == "Did it?"


def test_cross_validation_tests_every_item_once(folder: Path) -> None:
    task = find_task("causal_judgement")
    pools = task.load(Source.of(folder), None)
    tested: list[Example] = []
    for fold in range(4):
        parts = divide(task, pools, Division({"validation": 5}, folds=4, fold=fold))
        assert len(parts.train) + len(parts.validation) + len(parts.test) == 40
        assert parts.leakage.clean
        tested += parts.test
    assert Counter(map(repr, tested)) == Counter(map(repr, pools.train))
    with pytest.raises(ConfigError, match=r"data\.fold is 4, but with 4 folds it must be 0 to 3"):
        divide(task, pools, Division(folds=4, fold=4))
    with pytest.raises(ConfigError, match="math500 has one"):
        divide(find_task("math500"), find_task("math500").load(Source.of(folder), None), Division(folds=4))


def test_math_trains_on_solutions_and_drops_what_has_no_answer(folder: Path) -> None:
    task = find_task("math500")
    pools = task.load(Source.of(folder), None)
    assert (len(pools.train), pools.dropped) == (30, 1)
    assert pools.train[0].target == "It is $\\boxed{1}$."
    assert pools.test is not None
    assert pools.test[0].target == "2"
    with pytest.raises(DataError, match="needs more than the 0 examples"):
        divide(task, pools, Division({"train": 5, "test": 5}, target_tokens=3), tokenizer_of())


@pytest.mark.parametrize(
    ("file", "row", "words"),
    [
        ("imdb/train.jsonl", {"text": "a", "label": 2}, "line 1: the field 'label' must be 0 or 1, not 2"),
        ("imdb/test.jsonl", {"label": 1}, "line 1 has no field 'text'"),
        ("causal_judgment/bigbench.jsonl", {"input": "a", "target": "Maybe"}, "must be Yes or No, not 'Maybe'"),
        ("causal_judgment/bigbench.jsonl", {"input": "Q: \nA:", "target": "Yes"}, "holds no story"),
        ("math500/test.jsonl", {"problem": "a", "answer": None}, "the field 'answer' must be text"),
    ],
)
def test_rows_that_are_not_usable(folder: Path, file: str, row: dict[str, Any], words: str) -> None:
    (folder / file).write_text(json.dumps(row) + "\n")
    name = {"imdb": "imdb", "causal_judgment": "causal_judgement", "math500": "math500"}[file.split("/")[0]]
    with pytest.raises(DataError, match=words):
        find_task(name).load(Source.of(folder), None)


def test_names_and_folders_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="there is no task 'imbd'; did you mean 'imdb'"):
        find_task("imbd")
    with pytest.raises(ConfigError, match="choose one of imdb, causal_judgement, math500, movie-snippets"):
        find_task("x")
    with pytest.raises(DataError, match=r"no data folder .*none \(data.folder\)"):
        Source.of(tmp_path / "none")
    monkeypatch.setenv("EMBEDGRAD_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"\(EMBEDGRAD_DATA\)"):
        Source.of(None)
    monkeypatch.setenv("EMBEDGRAD_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"there is no data file .*imdb/train\.jsonl"):
        find_task("imdb").load(Source.of(None), None)


def fake_hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """A stand-in for the package `datasets`; the list of what is asked of it."""
    asked: list[tuple[str, str | None, str]] = []
    hub = {
        ("stanfordnlp/imdb", "train"): ROWS["imdb/train.jsonl"],
        ("stanfordnlp/imdb", "test"): ROWS["imdb/test.jsonl"],
        ("lukaemon/bbh", "test"): ROWS["causal_judgment/bbh.jsonl"],
        ("tasksource/bigbench", "train"): [
            {"inputs": f"Q: {text}\nA:", "targets": [("Yes", "No")[n % 2]]} for text, n in CAUSAL[:30]
        ],
        ("tasksource/bigbench", "validation"): [
            {"inputs": text, "targets": [("Yes", "No")[n % 2]]} for text, n in CAUSAL[30:]
        ],
        ("DigitalLearningGmbH/MATH-lighteval", "train"): ROWS["math_train/train.jsonl"],
        ("HuggingFaceH4/MATH-500", "test"): ROWS["math500/test.jsonl"],
    }

    def load_dataset(repository: str, configuration: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((repository, configuration, split))
        return hub[repository, split]

    monkeypatch.delenv("EMBEDGRAD_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(
    ("name", "variant"),
    [("imdb", None), ("causal_judgement", "bigbench"), ("causal_judgement", "bbh"), ("math500", None)],
)
def test_the_hub_gives_what_the_folder_gives(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, variant: str | None
) -> None:
    local = find_task(name).load(Source.of(folder), variant)
    asked = fake_hub(monkeypatch)
    assert find_task(name).load(Source.of(None), variant) == local
    assert asked


def test_a_hub_that_fails_or_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch)

    def fails(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fails))
    with pytest.raises(
        DataError, match="stanfordnlp/imdb, train could not be had from the Hugging Face hub: no route to host"
    ):
        find_task("imdb").load(Source.of(None), None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"EMBEDGRAD_DATA or data.folder.*pip install embedgrad\[data\]"):
        find_task("imdb").load(Source.of(None), None)


@settings(deadline=None)
@given(st.text(max_size=60), st.integers(1, 20))
def test_a_cut_is_a_beginning_of_at_most_so_many_tokens(text: str, tokens: int) -> None:
    tokenizer = tokenizer_of()
    piece = cut(text, tokens, tokenizer)
    ids = tokenizer.encode(text)
    if len(ids) <= tokens:
        assert piece == text
    elif text.startswith(piece):  # the tokenizer normalises; texts it leaves alone are cut between characters
        assert tokenizer.decode(ids[:tokens], skip_special=False).startswith(piece)
        assert len(tokenizer.encode(piece)) <= tokens + 1


def test_long_texts_are_cut_where_short_ones_are() -> None:
    tokenizer = tokenizer_of()
    text = "The quick brown fox, 12 + 30, 漢字 and 😀. " * 200
    whole = tokenizer.decode(tokenizer.encode(text)[:100], skip_special=False).rstrip("\N{REPLACEMENT CHARACTER}")
    assert cut(text, 100, tokenizer) == whole


def test_reviews_that_begin_alike_are_one_once_cut() -> None:
    """The check is made on what the model will read."""
    start = "the quick brown fox jumps over the lazy dog and the film was great " * 3
    task = Task("cut", lambda source, variant: Pools([]), "x", sizes={"train": 1, "validation": 0, "test": 1})
    pools = Pools([Example(start + "one end", "a"), Example("other film", "b")], test=[Example(start + "another", "a")])
    parts = divide(task, pools, Division(query_tokens=20), tokenizer_of())
    assert parts.leakage.left_out == 1
    assert [example.query for example in parts.train] == ["other film"]


@pytest.mark.parametrize("variant", ["bigbench", "bbh"])
def test_real_causal_judgement(variant: str) -> None:
    """Stories that occur twice with opposite labels are in one part, and so are all variations of a story."""
    task = find_task("causal_judgement")
    pools = task.load(Source.of(data_folder()), variant)
    count = {"bigbench": 190, "bbh": 187}[variant]
    assert len(pools.train) == count
    twice = [key for key, n in Counter(text_key(e.query) for e in pools.train).items() if n == 2]
    assert len(twice) == 2
    assert task.grouping is not None
    group = task.grouping(pools.train)
    assert 60 <= len({group(example) for example in pools.train}) <= 70
    for seed in range(5):
        parts = divide(task, pools, Division(seed=seed))
        assert parts.leakage.clean
        assert parts.leakage.similar == {"validation": 0, "test": 0}
        for key in twice:
            assert (
                sum(key in {text_key(e.query) for e in part} for part in (parts.train, parts.validation, parts.test))
                <= 1
            )
    sizes = [len(divide(task, pools, Division(folds=5, fold=fold)).test) for fold in range(5)]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 4


def test_real_math_never_trains_on_its_test() -> None:
    task = find_task("math500")
    pools = task.load(Source.of(data_folder()), None)
    assert pools.test is not None
    assert (len(pools.test), len(pools.train), pools.dropped) == (500, 7498, 2)
    parts = divide(task, pools, Division())
    assert parts.leakage.clean
    assert parts.leakage.left_out == 0  # one differs from a test problem in a sign, so it is another problem


def test_real_imdb_is_balanced() -> None:
    task = find_task("imdb")
    pools = task.load(Source.of(data_folder()), None)
    assert pools.test is not None
    for part in (pools.train, pools.test):
        assert Counter(example.target for example in part) == {"positive": 2500, "negative": 2500}
