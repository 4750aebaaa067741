"""Reports agree with the run's files, name what is missing, load nothing, and escape all texts."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from embedgrad.cli.app import app
from embedgrad.cli.commands import report as command
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.report import content, markdown
from embedgrad.report.curves import COLUMNS, heat_map
from embedgrad.report.read import read_run, shown
from embedgrad.util.errors import ConfigError, EmbedGradError
from tests.train.training import tiny_model

pytest.importorskip("plotly")
EVIL = "</script><script>alert('x')</script> | `tick` **bold** ![p](http://x) {{ 7*7 }} & \u2028 <!-- \n# heading"


def written(*runs: Path, output: Path | None = None, examples: int = 5) -> tuple[str, str]:
    """The page and its Markdown twin of these runs."""
    command.run(runs, output, examples)
    page = output or runs[0] / "report.html"
    return page.read_text("utf-8"), page.with_suffix(".md").read_text("utf-8")


def figures(page: str) -> dict[str, Any]:
    """The pictures that a page draws."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def without_plotly(page: str) -> str:
    """The page's own text."""
    scripts = re.findall(r"<script>.*?</script>", page, re.DOTALL)
    return page.replace(max(scripts, key=len), "")


def test_a_report_says_what_the_run_says(copied: Path) -> None:
    summary = json.loads((copied / "summary.json").read_text())
    page, twin = written(copied)
    for text in (page, twin):
        text = text.replace("\\", "").replace("\u00a0", " ")
        for name in ("generated_accuracy", "choice_accuracy"):
            for when in ("before", "after"):
                low, high = summary["intervals"][name][when]
                assert f"{100 * summary[name][when]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]" in text
        assert "eakage check (train 12, validation 4, test 8): no text is in two parts." in text
        assert "lowest similarity of the best prompt" in text
        assert "learning_rate: 0.1" in text
        assert summary["versions"]["torch"] in text
        assert summary["computing"]["backend"] in text
        assert "below 0.9: the prompt drifts" in text
        assert "Say what it is." in text
    assert f"{summary['validation']['after']['loss']:.4f}" in page
    assert set(figures(page)) == {f"run1-{key}" for key in ("loss", "accuracy", "similarity", "entropy", "tokens")}


def test_pictures_hold_the_records(copied: Path) -> None:
    records = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    drawn = figures(written(copied)[0])
    loss = {trace["name"]: trace for trace in drawn["run1-loss"]["data"]}
    assert loss["training batch"]["y"] == pytest.approx([record["loss"] for record in steps])
    assert loss["validation"]["x"] == [0, 3, 6]
    assert len(loss["alarm"]["x"]) == sum(record["kind"] == "alarm" for record in records)
    similarity = {trace["name"]: trace for trace in drawn["run1-similarity"]["data"]}
    alarm = next(record for record in records if record["kind"] == "alarm" and record["sign"] == "similarity")
    assert alarm["value"] in similarity["alarm"]["y"]
    heat = drawn["run1-tokens"]["data"][0]
    assert heat["x"] == [1, 2, 3, 4, 5, 6]
    assert [row[-1] for row in heat["z"]] == pytest.approx(steps[-1]["similarity"], abs=1e-4)
    levels = [
        shape["y0"] for shape in drawn["run1-similarity"]["layout"]["shapes"] if shape.get("y0") == shape.get("y1")
    ]
    assert 0.9 in levels


def test_tokens_are_named_without_the_model(copied: Path) -> None:
    model = tiny_model()
    prompt = SoftPrompt.load(copied / "prompt.safetensors")
    texts = [model.tokenizer.decode([id], skip_special=False) for id in prompt.token_ids]
    run = read_run(copied)
    assert run.token_names == [shown(text) for text in texts]
    assert all(token.before == (name, 1.0, 1) for token, name in zip(run.tokens, run.token_names, strict=True))
    assert all(token.after is not None for token in run.tokens)
    (copied / "summary.json").unlink()  # as after a kill: then the validations' texts serve
    assert read_run(copied).token_names == run.token_names
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    bare = [{k: v for k, v in json.loads(line).items() if k != "nearest_texts"} for line in lines]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bare))
    assert read_run(copied).token_names == [f"id {id}" for id in prompt.token_ids]


def test_the_page_loads_nothing(copied: Path) -> None:
    page, _ = written(copied)
    own = without_plotly(page)
    assert "default-src 'none'" in own
    assert not re.search(r"<(link|img|iframe|script src|object|embed)\b", own)
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:|//)", own)
    assert page.count("plotly.js v") == 1


def test_no_text_is_markup(copied: Path) -> None:
    """Texts are escaped in the page, its scripts, plotly's labels and Markdown."""
    test = json.loads((copied / "test.json").read_text())
    for when, right in (("before", False), ("after", True)):
        test[when]["records"][0] |= {"query": EVIL, "generated": EVIL, "target": EVIL, "generated_correct": right}
    (copied / "test.json").write_text(json.dumps(test))
    summary = json.loads((copied / "summary.json").read_text())
    summary |= {"model": EVIL, "task": EVIL, "token_texts": [EVIL] * summary["prompt_tokens"]}
    (copied / "summary.json").write_text(json.dumps(summary))
    (copied / "config.yaml").write_text(f"note: |\n  ```\n  {EVIL.splitlines()[0]}\n")
    evil = copied.with_name("<b>evil|`")
    copied.rename(evil)
    page, twin = written(evil)
    own = without_plotly(page)
    assert "<script>alert" not in page
    assert "<b>evil" not in own
    assert own.count("<script") == own.count("</script>") == 2
    assert "&lt;script&gt;" in figures(page)["run1-tokens"]["layout"]["yaxis"]["ticktext"][0] or "&lt;" in json.dumps(
        figures(page)["run1-tokens"]["data"][0]["text"]
    )
    outside = re.sub(r"(?ms)^(`{3,})[^\n]*\n.*?^\1$", "", twin)  # what is not in a fence
    assert "<script>" not in outside.replace("\\<", "")
    assert re.search(r"(?<!\\)\*\*bold", outside) is None
    assert "\n# heading" not in outside
    for line in outside.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 7, 12)
    assert "````yaml" in twin


def test_markdown_escapes() -> None:
    assert markdown.plain("a|b `c` <d> *e* _f_ [g](h) $i$ ~j~") == (
        r"a\|b \`c\` \<d\> \*e\* \_f\_ \[g\](h) \$i\$ \~j\~"
    )
    assert markdown.plain("- x") == r"\- x"
    assert markdown.plain("1. x") == r"1\. x"
    assert markdown.plain("0.95, -9.4") == "0.95, -9.4"
    assert markdown.plain("one\n\ntwo") == "one ↵ two"
    assert markdown.fenced("a ```` b")[0] == "`````"


def test_examples_are_limited(copied: Path) -> None:
    test = json.loads((copied / "test.json").read_text())
    for when, right in (("before", False), ("after", True)):
        for record in test[when]["records"]:
            record["generated_correct"] = right
    for when, right in (("before", True), ("after", False)):
        test[when]["records"][-1]["generated_correct"] = right
    (copied / "test.json").write_text(json.dumps(test))
    page, twin = written(copied, examples=2)
    for text in (page, twin):
        assert "From wrong to right: 7, the first 2 of them" in text
        assert "From right to wrong: 1" in text
    assert page.count('<div class="example">') == 3
    assert "Test examples that changed" not in written(copied, examples=0)[0]


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        (["config.yaml", "metrics.jsonl", "prompt.safetensors"], ["no usable summary.json", "not tried on test data"]),
        (["metrics.jsonl"], ["no readable config.yaml", "no usable prompt.safetensors"]),
        (["config.yaml"], ["No step has been recorded", "There was no validation"]),
        (["prompt.safetensors"], ["No step has been recorded"]),
        (["summary.json"], ["There is no test.json", "no readable config.yaml"]),
        (["config.yaml", "metrics.jsonl", "prompt.safetensors", "summary.json"], ["There is no test.json"]),
    ],
)
def test_what_is_missing_is_said(kept: list[str], told: list[str], finished: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in kept:
        shutil.copy(finished / name, tmp_path / "run" / name)
    page, twin = written(tmp_path / "run")
    for text in told:
        assert text in page
        assert text in twin


def test_damaged_files_are_named_and_the_rest_is_shown(copied: Path) -> None:
    (copied / "summary.json").write_text("{")
    (copied / "test.json").write_text("[]")
    (copied / "prompt.safetensors").write_bytes(b"\0" * 9)
    (copied / "config.yaml").write_text("a: [b")
    with open(copied / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 7, "lo')
    page, _ = written(copied)
    for text in ("summary.json is damaged", "test.json is damaged", "config.yaml is not YAML", "a: [b"):
        assert text in page
    assert figures(page)["run1-loss"]["data"][0]["x"] == [1, 2, 3, 4, 5, 6]
    assert figures(page)["run1-tokens"]["layout"]["yaxis"]["ticktext"][0] == "0 row 0"


def test_records_with_holes_and_nan(copied: Path) -> None:
    """Fields that a record lacks, has as null or NaN, or has as something else are points that are not drawn."""
    lines = [
        {"kind": "step", "step": 1},
        {"kind": "step", "step": 2, "loss": None, "similarity": [0.5, float("nan")]},
        {"kind": "step", "step": 3, "loss": float("nan"), "similarity_min": "x"},
        {"kind": "step", "step": 4, "loss": 0.5, "similarity": "x"},
        {"kind": "validation", "step": 4, "answers": None, "nearest": [1], "gap": 0.1},
        {"kind": "alarm", "step": 4, "sign": "new"},
        {"kind": "other"},
    ]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = figures(written(copied)[0])
    assert [(trace["name"], trace["x"]) for trace in drawn["run1-loss"]["data"]] == [
        ("training batch", [4]),
        ("alarm", [4]),
    ]
    assert set(drawn) == {"run1-loss"}


def test_a_summary_that_contradicts_the_answers_is_caught(copied: Path) -> None:
    """A summary with better figures than the answers have."""
    summary = json.loads((copied / "summary.json").read_text())
    true = summary["generated_accuracy"]["after"]
    summary["generated_accuracy"]["after"] = 0.99
    (copied / "summary.json").write_text(json.dumps(summary))
    page = written(copied)[0].replace("\u00a0", " ")
    assert "summary.json gives 99.0 % for “answer as generated” after, but the answers in test.json come to" in page
    assert f"{100 * true:.1f} % before" in page or f"{100 * true:.1f} % after" in page


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every inner value; of a list only its first item."""
    inside = values.items() if isinstance(values, dict) else enumerate(values[:1]) if isinstance(values, list) else ()
    for key, value in inside:
        yield (*path, key)
        yield from places(value, (*path, key))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["summary.json", "test.json", "metrics.jsonl"])
def test_values_of_any_kind_are_survived(name: str, copied: Path) -> None:
    lines = (copied / name).read_text().splitlines()
    whole = [json.loads(line) for line in lines] if name == "metrics.jsonl" else json.loads("".join(lines))
    for path in places(dict(enumerate(whole[:3])) if isinstance(whole, list) else whole):
        for other in (None, [[1]], "x", 1e400):
            changed = json.loads(json.dumps(whole))
            inside = changed
            for key in path[:-1]:
                inside = inside[key]
            inside[path[-1]] = other
            told = changed if isinstance(changed, list) else [changed]
            (copied / name).write_text("".join(json.dumps(one) + "\n" for one in told))
            content.build([read_run(copied)], 5)


def test_an_interrupted_run(copied: Path) -> None:
    summary = json.loads((copied / "summary.json").read_text()) | {"stop_reason": "interrupted", "steps": 4}
    (copied / "summary.json").write_text(json.dumps(summary))
    assert (
        "The run was interrupted after step 4; `embedgrad optimize ... --resume` goes on with it." in written(copied)[0]
    )


def test_several_runs(copied: Path, finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "second"
    shutil.copytree(finished, other)
    (other / "summary.json").unlink()
    (other / "test.json").unlink()
    with pytest.raises(ConfigError, match=r"say where with --output FILE\.html\.$"):
        command.run([copied, other], None, 5)
    page, twin = written(copied, other, output=tmp_path / "both.html")
    for text in (page, twin):
        assert "Comparison" in text
        assert "unfinished" in text
    drawn = figures(page)
    assert [trace["name"] for trace in drawn["all-loss"]["data"]] == ["first", "second"]
    assert {key.split("-")[0] for key in drawn} == {"all", "run1", "run2"}
    twice = content.build([read_run(copied), read_run(finished)], 5)
    assert [section.title for section in twice.sections] == [str(copied), str(finished)]


def test_pictures_beside_the_markdown(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    _, twin = written(copied)
    links = re.findall(r"!\[[^\]]*\]\(<([^>]+)>\)", twin)
    assert links == [f"report-{key}.svg" for key in ("loss", "accuracy", "similarity", "entropy", "tokens")]
    first = [(copied / link).read_bytes() for link in links]
    assert all(b"</svg>" in data for data in first)
    written(copied)
    assert [(copied / link).read_bytes() for link in links] == first
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "![" not in written(copied)[1]


def test_long_runs_are_thinned(finished: Path) -> None:
    run = read_run(finished)
    step = run.steps[-1]
    run.steps[:] = [step | {"step": i} for i in range(1, 1001)]
    heat = heat_map(run)
    assert heat is not None
    assert len(heat.steps) == COLUMNS
    assert (heat.steps[0], heat.steps[-1]) == (1, 1000)
    assert "Of 1000 steps 240 are shown" in heat.note


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert isinstance(result.exception, EmbedGradError), result.output
    return str(result.exception)


def test_refusals(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no run; give a folder that `embedgrad optimize` has written" in refused(tmp_path / "empty")
    assert "there is no folder" in refused(tmp_path / "nowhere")
    assert "there is no folder" in refused(copied / "summary.json")
    assert "should be the name of an .html file" in refused(copied, "--output", tmp_path / "x.txt")
    assert "cannot write" in refused(copied, "--output", tmp_path / "nowhere" / "x.html")
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    assert refused(copied) == "a report's pictures need plotly: pip install 'embedgrad[report]'."


def test_the_command(copied: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(copied), "--examples", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    assert str(copied / "report.html") in result.stdout
