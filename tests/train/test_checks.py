"""An error in any part of the data is found before the first step, and named by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.train.checks import check_parts
from embedgrad.train.plan import plan
from embedgrad.train.settings import run_config
from embedgrad.util.errors import ContextError, DataError, EmbedGradError
from tests.train.training import start_prompt, tiny_model

PARTS = ("train", "validation", "test")


def check(folder: Path, rows: dict[str, list[tuple[str, str]]], grader: str = "exact", labels: object = None) -> None:
    """Checks data of three files, as `embedgrad optimize` does."""
    data: dict[str, object] = {"grader": grader, "labels": labels}
    for part, lines in rows.items():
        path = folder / f"{part}.jsonl"
        path.write_text("".join(json.dumps({"query": q, "target": t}) + "\n" for q, t in lines))
        data[part] = str(path)
    planned = plan(run_config({"model": "m", "prompt": "p", "data": data}, "it"))
    model = tiny_model()
    check_parts(planned, model, start_prompt(model), planned.parts(model.tokenizer))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(PARTS), st.integers(0, 5), st.sampled_from([" yes", "Yes", "maybe", "yes."]))
def test_a_target_that_is_no_label(tmp_path_factory: pytest.TempPathFactory, part: str, line: int, target: str) -> None:
    folder = tmp_path_factory.mktemp("labels")
    rows = {name: [(f"{name} {i}", "yes") for i in range(6)] for name in PARTS}
    rows[part][line] = ("it", target)
    with pytest.raises(DataError) as raised:
        check(folder, rows, labels=["yes", "no"])
    assert str(raised.value).startswith(f"{folder / part}.jsonl, line {line + 1} has the target {target!r}")


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(PARTS), st.integers(0, 5))
def test_a_query_that_is_too_long(tmp_path_factory: pytest.TempPathFactory, part: str, line: int) -> None:
    folder = tmp_path_factory.mktemp("long")
    rows = {name: [(f"{name} {i}", "yes") for i in range(6)] for name in PARTS}
    rows[part][line] = ("word " * 5000, "yes")
    with pytest.raises(ContextError, match=r"data\.query_tokens") as raised:
        check(folder, rows)
    assert str(raised.value).startswith(f"{folder / part}.jsonl, line {line + 1}: ")


@pytest.mark.parametrize("part", PARTS)
def test_a_target_that_its_grader_cannot_read(tmp_path: Path, part: str) -> None:
    pytest.importorskip("math_verify")
    rows = {name: [(f"{name} {i}", f"so\n#### {i}") for i in range(3)] for name in PARTS}
    check(tmp_path, rows, "math")
    rows[part][2] = ("q", "I cannot say what it is at all")
    with pytest.raises(
        EmbedGradError, match=f"{part}.jsonl, line 3: the grader 'math' does not find the target 'I can"
    ):
        check(tmp_path, rows, "math")
