"""A configuration loses nothing: a key that stands twice is refused with both lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.train.settings import load_run_config
from embedgrad.train.yaml_text import read_yaml
from embedgrad.util.errors import ConfigError

START = "model: m\nprompt: p\ndata: {path: d, split: {train: 8}}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (START + "optimize: {steps: 50}\noptimize: {learning_rate: 1e-2}\n", "in line 4 and in line 5"),
        (START + "optimize:\n  steps: 5\n  seed: 1\n  steps: 6\n", "'steps' twice, in line 5 and in line 7"),
        (START + 'compare: {seeds: [1], "seeds": [2]}\n', "'seeds' twice, in line 4"),
        ("model: a\n" + START, "'model' twice, in line 1 and in line 2"),
        (START + "template:\n  messages:\n  - {role: user, content: a, role: user}\n", "'role' twice, in line 6"),
    ],
)
def test_a_key_twice_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_run_config(path)


@settings(deadline=None)
@given(st.lists(st.from_regex(r"[a-z]{1,3}", fullmatch=True), min_size=1, max_size=6))
def test_keys_are_kept_or_refused(names: list[str]) -> None:
    text = "".join(f"{name}: v{number}\n" for number, name in enumerate(names))
    if len(set(names)) == len(names):
        assert len(read_yaml(text, "it")) == len(names)
    else:
        with pytest.raises(ConfigError, match="twice"):
            read_yaml(text, "it")


def test_what_is_no_key_twice_is_read() -> None:
    assert read_yaml("a: &x {b: 1}\nc: {<<: *x, b: 2}\n1: d\n'1': e\n", "it") == {
        "a": {"b": 1}, "c": {"b": 2}, 1: "d", "1": "e",
    }  # fmt: skip
