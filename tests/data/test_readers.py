"""Data files: what is read, and what is refused with file and line."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.data.example import Example
from embedgrad.data.readers import read_jsonl, read_queries
from embedgrad.util.errors import DataError


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def test_reads_fields_by_name_skips_blank_lines_and_a_mark_in_front(tmp_path: Path) -> None:
    path = write(
        tmp_path, "\ufeff" + '{"text": "a b", "label": 0, "x": null}', "", "  ", '{"text": "ç", "label": "-3 "}'
    )
    assert read_jsonl(path, query="text", target="label") == [Example("a b", "0"), Example("ç", "-3 ")]
    assert read_jsonl(str(path), query="text", target="label", limit=1) == [Example("a b", "0")]


def test_the_limit_stops_before_a_broken_line(tmp_path: Path) -> None:
    path = write(tmp_path, '{"query": "a", "target": "b"}', "broken")
    assert len(read_jsonl(path, limit=1)) == 1


def test_queries_end_at_line_feeds_only_and_may_have_a_mark_in_front(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff" + '{"query": "a\u2028b"}', "", '{"query": 5}\r')
    assert read_queries(path) == ["a\u2028b", "5"]
    text = tmp_path / "data.txt"
    text.write_bytes("\ufeffa\u2028b\x0cc\r\n\n d\n".encode())
    assert read_queries(text) == ["a\u2028b\x0cc", " d"]


GOOD = '{"query": "a", "target": "b"}'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"query": "a", "target": ', "line 2 is not JSON: Expecting value at column 26"),
        ("nothing", "line 2 is not JSON: Expecting value at column 1"),
        ('["a", "b"]', "line 2 must be a JSON object, not a list"),
        ("3", "line 2 must be a JSON object, not a number"),
        ("null", "line 2 must be a JSON object, not null"),
        ('{"query": "a", "answer": "b"}', "line 2 has no field 'target'; its fields are: 'query', 'answer'"),
        ("{}", "line 2 has no field 'query'; its fields are: none"),
        ('{"query": "", "target": "b"}', "line 2: the field 'query' is empty"),
        ('{"query": "a", "target": " \\n"}', "line 2: the field 'target' is empty"),
        ('{"query": "a", "target": null}', "line 2: the field 'target' must be text or a whole number, not null"),
        ('{"query": "a", "target": true}', "must be text or a whole number, not true or false"),
        ('{"query": "a", "target": 1.5}', "must be text or a whole number, not a decimal number"),
        ('{"query": ["a"], "target": "b"}', "the field 'query' must be text or a whole number, not a list"),
        ('{"query": "\\ud800", "target": "b"}', "the field 'query' has half of a surrogate pair"),
        (b'{"query": "\xff", "target": "b"}', r"line 2 is not UTF-8 \(byte 12 of the line\)"),
        ("[" * 100_000, "line 2 is nested too deeply"),
        ('{"query": "a", "target": ' + "9" * 5000 + "}", "line 2 is not usable JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, said: str) -> None:
    path = write(tmp_path, GOOD, line)
    with pytest.raises(DataError, match=said) as raised:
        read_jsonl(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_files_that_are_missing_empty_or_no_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no data file .*absent\.jsonl"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"data\.jsonl is empty"):
        read_jsonl(write(tmp_path))
    with pytest.raises(DataError, match=r"data\.jsonl is empty"):
        read_jsonl(write(tmp_path, "", " "))
    with pytest.raises(DataError, match="cannot be read"):
        read_jsonl(tmp_path)
    with pytest.raises(DataError, match="limit"):
        read_jsonl(write(tmp_path, GOOD), limit=0)


FIELD = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=5),
    st.sampled_from(["lines", "array", "indented array", "csv", "semicolons", "tsv", "pandas"]),
    st.booleans(),
)
def test_rows_are_the_same_in_every_form(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], form: str, marked: bool
) -> None:
    objects = [{"query": q, "target": t} for q, t in rows]
    if form in ("lines", "array", "indented array"):
        name, indent = "d.json", 2 if form.startswith("indented") else None
        text = "\n".join(map(json.dumps, objects)) if form == "lines" else json.dumps(objects, indent=indent)
    else:
        name, separator = ("d.tsv", "\t") if form == "tsv" else ("d.csv", ";" if form == "semicolons" else ",")
        out = io.StringIO(newline="")
        writer = csv.writer(out, delimiter=separator)
        numbered = form == "pandas"  # an index column without a name, which the reader leaves out
        writer.writerow([*([""] if numbered else []), "query", "target"])
        writer.writerows([[*([n] if numbered else []), q, t] for n, (q, t) in enumerate(rows)])
        text = out.getvalue()
    path = tmp_path_factory.mktemp("forms") / name
    path.write_bytes((b"\xef\xbb\xbf" if marked else b"") + text.encode())
    found = read_jsonl(path)
    assert found == [Example(q, t) for q, t in rows]
    assert all(example.where.startswith(f"{path}, line ") for example in found)
    assert read_queries(path) == [q for q, _ in rows]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '[{"query": "a", "target": "b"},\n {"query": "a"}]', r"line 2 \(item 2 of the array\) has no field"),
        ("a.json", '[\n{"query": "a",\n "target": "b"}\n, 5]', r"line 4 \(item 2 of the array\) must be a JSON object"),
        ("a.json", '[{"query": "a", "target": "b"}\n', "followed by the end of the file"),
        ("a.json", '[{"query": "a", "target": "b"}]\n{}', "line 2: more text follows the array"),
        ("a.json", '[{"query": "a"\n "target": "b"}]', "line 2 is not JSON: Expecting ',' delimiter"),
        ("a.json", "[]", "is empty"),
        ("a.json", '{\n"query": "a",\n"target": "b"}', "one object on several lines"),
        ("a.jsonl", '{"query": "a", "query": "b", "target": "c"}', "line 1 has the field 'query' twice"),
        ("a.csv", "query,target\na,b\n\nc\n", "line 4 has 1 fields; the header has 2"),
        ("a.csv", 'query,target\n"a\nb",c\nd,\n', "line 4: the field 'target' is empty"),
        ("a.csv", "query,query\na,b\n", "line 1, the header, has the name 'query' twice"),
        ("a.csv", "text,label\na,b\n", "line 2 has no field 'query'; its fields are: 'text', 'label'"),
        ("a.csv", 'query,target\na,"b"c\n', "line 2 is not a row of a table"),
        ("a.parquet", "PAR1....", "is a Parquet file; save it as JSON lines"),
    ],
)
def test_a_bad_row_of_another_form_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=said) as raised:
        read_jsonl(path)
    assert str(raised.value).startswith(str(path))


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":, \n\\ua1queryta', max_size=60).map(str.encode))
def test_any_bytes_give_examples_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "data.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + data)
    try:
        examples = read_jsonl(path)
    except DataError as error:
        said = str(error)
    else:
        assert examples[0] == Example("a", "b")
        return
    assert "\n" not in said


def test_shared_data(tmp_path: Path) -> None:
    folder = os.environ.get("EMBEDGRAD_DATA")
    if not folder:
        pytest.skip("EMBEDGRAD_DATA is not set")
    examples = read_jsonl(Path(folder) / "imdb" / "train.jsonl", query="text", target="label", limit=50)
    assert len(examples) == 50
    assert {example.target for example in examples} <= {"0", "1"}


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0, 1e308, "1", None, True])
def test_an_example_refuses_a_weight_that_is_none(weight: object) -> None:
    with pytest.raises(DataError, match="weight must be"):
        Example("a", "b", weight=weight)  # type: ignore[arg-type]
