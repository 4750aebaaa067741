"""YAML that stands for more than it says is refused before it is expanded."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.train.settings import load_run_config
from embedgrad.util.bounded_yaml import BoundedLoader, TooLarge
from embedgrad.util.errors import ConfigError


def bomb(depth: int, width: int, form: str) -> str:
    lines = ["a0: &a0 [x]" if form == "list" else "a0: &a0 {x: 1}"]
    for n in range(1, depth):
        inner = ", ".join([f"*a{n - 1}"] * width)
        lines.append({
            "list": f"a{n}: &a{n} [{inner}]",
            "mapping": f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(width))}}}",
            "merge": f"a{n}: &a{n} {{<<: [{inner}]}}",
        }[form])  # fmt: skip
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("form", ["list", "mapping", "merge"])
@pytest.mark.parametrize("where", ["file", "set"])
def test_a_bomb_of_aliases_is_refused_at_once(tmp_path: Path, form: str, where: str) -> None:
    text = bomb(20, 10, form)
    (tmp_path / "c.yaml").write_text(text if where == "file" else "model: x\n")
    one_line = "[&a0 [x]" + "".join(f", &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)) + "]"
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ConfigError, match="stands for more than 1,000,000 characters and values") as refused:
        load_run_config(tmp_path / "c.yaml", [] if where == "file" else [f"data.path={one_line}"])
    assert len(str(refused.value)) < 500
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_an_alias_inside_of_itself(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: &a [*a]\n")
    with pytest.raises(ConfigError, match="has an alias inside of what it stands for"):
        load_run_config(tmp_path / "c.yaml")


def test_a_long_text_that_is_aliased() -> None:
    with pytest.raises(TooLarge):
        yaml.load(f"- &a {'x' * 100_000}\n" + "- *a\n" * 10, BoundedLoader)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(alphabet="ab: é", max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet="ab", max_size=3), inner),
    )
)
def test_other_texts_are_read_as_before(value: object) -> None:
    text = yaml.safe_dump([value, value])  # PyYAML writes the second one as an alias
    assert yaml.load(text, BoundedLoader) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "override", ["x" * 10**6, "data=" + "x" * 10**6, "x" * 10**6 + "=1", "optimize.steps=0x" + "f" * 10**5]
)
def test_overrides_of_a_million_characters(tmp_path: Path, override: str) -> None:
    (tmp_path / "c.yaml").write_text("model: x\nprompt: p\ndata: {path: d, split: {train: 1, validation: 1}}\n")
    with pytest.raises(ConfigError) as refused:
        load_run_config(tmp_path / "c.yaml", [override])
    assert len(str(refused.value)) < 1000
