"""Texts that people write are the same text by every way in."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.data.readers import query_lines, read_queries
from embedgrad.train.plan import prompt_text
from embedgrad.train.settings import PromptSection, load_run_config
from embedgrad.util.errors import ConfigError, DataError
from embedgrad.util.text import decoded, read_text, with_line_feeds, without_final_break

BREAKS = st.sampled_from(["\n", "\r\n"])
SIGNS = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufeff")
LINES = st.lists(st.text(SIGNS, min_size=1).filter(str.strip), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(LINES, BREAKS, st.booleans(), st.booleans())
def test_a_prompt_file_has_the_same_text_with_any_mark_and_line_ends(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], line_break: str, marked: bool, ended: bool
) -> None:
    path = tmp_path_factory.mktemp("text") / "p.txt"
    written = line_break.join(lines) + (line_break if ended else "")
    path.write_bytes((b"\xef\xbb\xbf" if marked else b"") + written.encode())
    assert prompt_text(PromptSection(file=str(path))) == "\n".join(lines)


@settings(deadline=None, max_examples=60)
@given(LINES, BREAKS, st.booleans())
def test_queries_are_the_same_from_a_file_and_from_stdin(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], line_break: str, marked: bool
) -> None:
    data = (b"\xef\xbb\xbf" if marked else b"") + line_break.join(lines).encode()
    path = tmp_path_factory.mktemp("text") / "q.txt"
    path.write_bytes(data)
    assert read_queries(path) == query_lines(data.splitlines(keepends=True), "stdin") == lines


@pytest.mark.parametrize("sign", ["|", ">", "|+", ">-"])
def test_a_block_of_yaml_is_the_text_that_a_file_would_be(tmp_path: Path, sign: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: m\nprompt: {sign}\n  Rate it.\ndata: {{path: d, split: {{train: 8}}}}\n")
    assert prompt_text(load_run_config(path).prompt) == "Rate it."
    path.write_text(f"model: m\nprompt:\n  text: {sign}\n    Rate it.\ndata: {{path: d, split: {{train: 8}}}}\n")
    assert prompt_text(load_run_config(path).prompt) == "Rate it."


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "latin-1", "cp1252"])
def test_another_encoding_is_refused_by_name(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "t.txt"
    data = "\ufeffcafé".encode(encoding) if encoding == "utf-16-be" else "café".encode(encoding)
    path.write_bytes(data)
    name = encoding.upper()[:6] if encoding.startswith("utf") else "is not UTF-8"
    with pytest.raises(ConfigError, match=name):
        read_text(path, "the prompt file", ConfigError)
    with pytest.raises(DataError, match="UTF"):
        read_queries(path)


def test_small_parts() -> None:
    assert decoded(b"\xef\xbb\xbfa", first=False) == "\ufeffa"
    assert with_line_feeds("a\r\nb\rc\n") == "a\nb\nc\n"
    assert [without_final_break(text) for text in ("a\r\n", "a\n\n", "a")] == ["a", "a\n", "a"]
