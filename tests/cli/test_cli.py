"""The command line: what it prints, what it leaves, its exit codes, and that it starts fast."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from embedgrad.cli import doctor
from embedgrad.cli.app import app
from embedgrad.cli.commands.optimize import _quoted
from embedgrad.engine import prompt_trainer
from embedgrad.engine.gradient import launch_gradient, loss_and_grad
from embedgrad.evaluation.neighbours import neighbours
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.train.run_folder import read_summary
from embedgrad.util.errors import EmbedGradError
from embedgrad.util.shown import visible
from tests.train.training import model_folder, outcome, start_prompt, tiny_model

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200", "TRITON_INTERPRET": "0"}


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`embedgrad ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "embedgrad.cli.app", *map(str, arguments)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip


def invoke(*arguments: object, **options: Any) -> Any:
    """The same in this process; errors are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"}, **options)
    if isinstance(result.exception, EmbedGradError):
        raise result.exception
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with data and a configuration of a short run."""
    words = ["joy", "pain", "wit", "noise"]
    lines = [{"text": f"A film of {words[i % 4]}, number {i}", "label": ["good", "bad"][i % 2]} for i in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "model": {"path": str(model_folder()), "device": "cpu"},
        "prompt": "Say what it is.",
        "data": {
            "path": str(tmp_path / "data.jsonl"), "query": "text", "target": "label", "labels": ["good", "bad"],
            "split": {"train": 12, "validation": 4, "test": 6},
        },
        "optimize": {"steps": 6, "batch_size": 4, "validate_every": 3, "checkpoint_every": 2, "learning_rate": 0.02},
        "run": {"folder": str(tmp_path / "runs")},
        "sampling": {"max_new_tokens": 4},
    }  # fmt: skip
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    prompt = start_prompt(tiny_model())
    noise = torch.randn(prompt.anchor.shape, generator=torch.Generator().manual_seed(0))
    prompt.replace(embeddings=prompt.anchor + 0.01 * noise).save(tmp_path / "prompt.safetensors")
    return tmp_path / "prompt.safetensors"


def test_help_is_immediate_and_loads_no_torch() -> None:
    command("--help")  # writes the byte code
    started = time.monotonic()
    result = command("--help")
    assert time.monotonic() - started < 1.0
    assert result.returncode == 0
    for name in ("optimize", "evaluate", "report", "generate", "show", "doctor"):
        assert name in result.stdout
    loaded = "import sys, embedgrad.cli.app; print(sorted(set(sys.modules) & {'torch', 'numpy', 'pydantic', 'rich'}))"
    code = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True)
    assert "torch" not in code.stdout
    assert "pydantic" not in code.stdout


def test_optimize_from_file_to_summary(workplace: Path) -> None:
    result = invoke("optimize", workplace / "first.yaml", "--set", "optimize.trust_region.tau=0.9")
    assert result.exit_code == 0
    folder = workplace / "runs" / "first"
    assert str(folder / "prompt.safetensors") in result.stdout
    assert "6 steps" in result.stdout
    summary = read_summary(folder)
    assert summary["test_examples"] == 6
    for name in ("generated_accuracy", "choice_accuracy"):
        assert set(summary[name]) == {"before", "after"}
        for when in ("before", "after"):
            low, high = summary["intervals"][name][when]
            assert 0 <= low <= summary[name][when] <= high <= 1
    assert len(json.loads((folder / "test.json").read_text())["after"]["records"]) == 6
    assert summary["steps"] == 6
    assert summary["weights_unchanged"] is True
    assert summary["min_similarity"] >= 0.9 - 1e-6
    assert summary["train_seconds"] > 0
    assert summary["peak_memory_bytes"] > 10**7
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["optimize"]["trust_region"]["tau"] == 0.9
    assert config["data"]["split"]["train"] == 12


def test_optimize_as_json_lines_and_quiet(workplace: Path) -> None:
    result = invoke("optimize", workplace / "first.yaml", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["kind"] for line in lines].count("step") == 6
    assert lines[0]["kind"] == "note"
    assert "leakage check (train 12, validation 4, test 6): no text is in two parts" in lines[0]["text"]
    assert lines[1] == {"kind": "start", "total": 6, "done": 0}
    assert lines[-1]["kind"] == "summary"
    assert lines[-1]["steps"] == 6
    result = invoke("optimize", workplace / "first.yaml", "--quiet", "--set", "run.name=second")
    assert result.stdout == ""
    assert read_summary(workplace / "runs" / "second")["steps"] == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    """The resumed run ends like a run that was never stopped."""
    path = workplace / "first.yaml"
    invoke("optimize", path, "--quiet", "--set", "run.name=whole")
    calls = 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), number)
        return launch_gradient(*arguments, **options)

    monkeypatch.setattr(prompt_trainer, "launch_gradient", interrupted)
    result = invoke("optimize", path, "--quiet", "--set", "run.name=broken")
    assert result.exit_code == code
    assert "Stopped after step 3" in result.stderr
    assert f"embedgrad optimize {path} --set 'run.name=broken' --resume" in result.stderr
    result = invoke("optimize", path, "--quiet", "--set", "run.name=broken", "--resume")
    assert result.exit_code == 0
    whole, broken = (outcome(workplace / "runs" / name) for name in ("whole", "broken"))
    for content in (whole, broken):
        del content["summary"]["peak_memory_bytes"]
    assert whole == broken


@pytest.mark.parametrize("text", ["run.name=a", 'prompt=It\'s $HOME\n\\n "so"', "a='b'"])
def test_the_way_to_go_on_survives_a_shell(text: str) -> None:
    assert shlex.split(_quoted(text)) == [text]


def test_refusals_are_one_sentence_and_exit_code_2(workplace: Path) -> None:
    """In a process of its own, as a person sees it: no traceback, nothing on stdout."""
    (workplace / "wrong.yaml").write_text("model: x\nprompt: y\ndata: {train: z}\noptimise: {steps: 3}\n")
    result = command("optimize", workplace / "wrong.yaml")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"embedgrad: {workplace}/wrong.yaml: optimise is not a setting; did you mean 'optimize'.\n"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimize.trust_region.tau=1.5"], "tau is 1.5, but must be a number from -1 to 1"),
        (["optimize.steps=none"], "optimize.steps is 'none'"),
        (["model.path=/nowhere/model"], "/nowhere/model"),
        (["data.path=/nowhere/data.jsonl"], "/nowhere/data.jsonl"),
        (["data.query=question"], "line 1 has no field 'question'"),
        (["prompt.text=' '"], "prompt is empty"),
        (["data.split.train=500"], "500"),
        (["run.folder=/dev/null/runs"], "run folder /dev/null/runs"),
        (["model.path=" + "x" * 300], "too long"),
        (["data.labels=[good]"], "target 'bad', which is not one of good"),
        (["data.labels=[]"], "labels must be a list of at least one text"),
        (["sampling.temperature=1e-300"], "temperature is 1e-300"),
    ],
)
def test_unusable_runs_are_refused_in_words(workplace: Path, overrides: list[str], words: str) -> None:
    sets = [part for override in overrides for part in ("--set", override)]
    with pytest.raises(EmbedGradError) as refusal:
        invoke("optimize", workplace / "first.yaml", *sets)
    assert words in str(refusal.value)
    assert not (workplace / "runs").exists()  # refused before the run began


def test_a_name_too_long_to_resume(workplace: Path) -> None:
    (workplace / "runs").mkdir()
    with pytest.raises(EmbedGradError, match="too long"):
        invoke("optimize", workplace / "first.yaml", "--set", "run.name=" + "x" * 300, "--resume")


def test_a_second_run_of_one_name_is_refused(workplace: Path) -> None:
    invoke("optimize", workplace / "first.yaml", "--quiet")
    with pytest.raises(EmbedGradError, match="already holds a run"):
        invoke("optimize", workplace / "first.yaml", "--quiet")
    with pytest.raises(EmbedGradError, match=r"optimize\.seed \(0, now 3\)"):
        invoke("optimize", workplace / "first.yaml", "--quiet", "--resume", "--set", "optimize.seed=3")
    with pytest.raises(EmbedGradError, match="no run to resume"):
        invoke("optimize", workplace / "first.yaml", "--quiet", "--resume", "--set", "run.name=other")


def test_prompt_from_a_file(workplace: Path) -> None:
    (workplace / "prompt.txt").write_text("Say what it is.\n")
    invoke("optimize", workplace / "first.yaml", "-q", "--set", f"prompt={{file: {workplace / 'prompt.txt'}}}")
    saved = SoftPrompt.load(workplace / "runs" / "first" / "prompt.safetensors")
    assert saved.text == "Say what it is."
    with pytest.raises(EmbedGradError, match=r"cannot read the prompt file .*none\.txt"):
        invoke("optimize", workplace / "first.yaml", "--set", "prompt={file: /tmp/none.txt}")


def test_evaluate_writes_figures(workplace: Path, prompt_file: Path) -> None:
    options = ["--model", model_folder(), "--data", workplace / "data.jsonl", "--query-field", "text"]
    options += ["--target-field", "label", "--limit", 5, "--max-new-tokens", 3]
    output = workplace / "figures.json"
    result = invoke("evaluate", prompt_file, *options, "--label", "good", "--label", "bad", "--output", output)
    assert "5 examples" in result.stdout
    figures = json.loads(output.read_text())
    assert len(figures["records"]) == 5
    for name in ("generated_accuracy", "choice_accuracy"):
        assert 0 <= figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"] <= 1
    both = json.loads(invoke("evaluate", prompt_file, *options, "--before", "--json").stdout)
    assert len(both["before"]["records"]) == len(both["after"]["records"]) == 5
    assert both["before"]["choice_accuracy"] is None


def test_generate_in_batch(workplace: Path, prompt_file: Path) -> None:
    options = [prompt_file, "--model", model_folder(), "--max-new-tokens", 3]
    given = invoke("generate", *options, "--query", "one", "--query", "two", "--json")
    answers = [json.loads(line) for line in given.stdout.splitlines()]
    assert [answer["query"] for answer in answers] == ["one", "two"]
    (workplace / "queries.txt").write_text("one\n\ntwo\n")
    (workplace / "queries.jsonl").write_text('{"query": "one"}\n{"query": "two"}\n')
    for name in ("queries.txt", "queries.jsonl"):
        output = workplace / f"{name}.answers"
        invoke("generate", *options, "--input", workplace / name, "--output", output, "--batch-size", 1)
        assert [json.loads(line) for line in output.read_text().splitlines()] == answers
        assert not output.with_name(output.name + ".part").exists()
    piped = invoke("generate", *options, "--json", input="one\ntwo\n")
    assert [json.loads(line) for line in piped.stdout.splitlines()] == answers


def test_generate_at_the_terminal(
    prompt_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from embedgrad.cli.commands import generate

    lines = iter(["one", "", "too long " * 500, "two"])

    def typed(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    generate.run(tiny_model, prompt_file, generate.Options([], sampling={"max_new_tokens": 2}))
    said = capsys.readouterr()
    assert "the model's context holds" in said.err  # one refusal, and the conversation goes on
    monkeypatch.undo()
    generate.run(tiny_model, prompt_file, generate.Options(["one", "two"], sampling={"max_new_tokens": 2}))
    assert said.out == visible(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"query": "x"}\nnonsense\n', "line 2 is not JSON"),
        ('{"question": "x"}\n', "line 1 has no field 'query'"),
        ('{"query": " "}\n', "line 1: the field 'query'"),
        ("", "no queries"),
    ],
)
def test_unusable_queries(tmp_path: Path, prompt_file: Path, content: str, words: str) -> None:
    (tmp_path / "queries.jsonl").write_text(content)
    with pytest.raises(EmbedGradError, match=words):
        invoke("generate", prompt_file, "--model", "/never/opened", "--input", tmp_path / "queries.jsonl")


@pytest.mark.parametrize("name", ["", ".", "/", "/dev/null", "x" * 300])
def test_outputs_that_cannot_be_files(name: str, workplace: Path, prompt_file: Path) -> None:
    """Refused before anything is computed; above all, a device is not replaced by a file."""
    device = os.stat("/dev/null").st_mode
    options = [prompt_file, "--model", model_folder(), "--output", name]
    for order in (["generate", *options, "--query", "one"], ["evaluate", *options, "--data", workplace / "data.jsonl"]):
        with pytest.raises(EmbedGradError, match="cannot write"):
            invoke(*order)
    assert os.stat("/dev/null").st_mode == device


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_sentence(prompt_file: Path) -> None:
    for more in ([], ["--json"]):
        with open("/dev/full", "w") as full:
            result = subprocess.run(
                [sys.executable, "-m", "embedgrad.cli.app", "show", str(prompt_file), *more],
                cwd=ROOT, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120,
            )  # fmt: skip
        assert result.returncode == 2
        assert result.stderr == "embedgrad: the output cannot be written: No space left on device.\n"


def test_output_in_an_encoding_that_lacks_characters(tmp_path: Path) -> None:
    prompt = SoftPrompt.from_text(tiny_model(), "Über 你好")
    prompt.save(tmp_path / "prompt.safetensors")
    for more in ([], ["--json"]):
        result = subprocess.run(
            [sys.executable, "-m", "embedgrad.cli.app", "show", str(tmp_path / "prompt.safetensors"), *more],
            cwd=ROOT, env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["text"] == "Über 你好"


def test_show(prompt_file: Path) -> None:
    text = invoke("show", prompt_file, "--model", model_folder()).stdout
    assert "Say what it is." in text
    told = json.loads(invoke("show", prompt_file, "--model", model_folder(), "--json").stdout)
    prompt = SoftPrompt.load(prompt_file)
    assert [row["id"] for row in told["rows"]] == prompt.token_ids
    assert [row["similarity"] for row in told["rows"]] == prompt.similarity().tolist()
    assert "".join(row["token"] for row in told["rows"]) == "Say what it is."
    assert [row["nearest_id"] for row in told["rows"]] == prompt.token_ids  # it moved by a hundredth
    assert all(row["nearest_cosine"] == pytest.approx(row["similarity"], abs=1e-6) for row in told["rows"])
    without = json.loads(invoke("show", prompt_file, "--json").stdout)
    assert without["min_similarity"] == told["min_similarity"]


def test_nearest_tokens_against_the_whole_table() -> None:
    model = tiny_model()
    rows = torch.randn(7, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    table = model.embedding_rows(list(range(model.config.vocab_size)))
    cosine = torch.nn.functional.cosine_similarity(rows[:, None].double(), table[None].double(), dim=-1)
    expected = cosine.max(dim=1)
    ids = [3, 9, 12, 40, 41, 42, 7]
    found = neighbours(model, rows, ids)
    assert found.nearest == expected.indices.tolist()
    assert found.cosine == pytest.approx(expected.values.tolist(), abs=1e-6)
    own = cosine[torch.arange(7), torch.tensor(ids)]
    assert found.own_rank == ((cosine > own[:, None] + 1e-6).sum(dim=1) + 1).tolist()
    assert neighbours(model, model.embedding_rows(ids), ids).own_rank == [1] * 7


def test_files_that_are_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for path in (tmp_path / "text", tmp_path / "missing"):
        with pytest.raises(EmbedGradError, match=path.name):
            invoke("show", path)


def test_doctor_finds_the_gradient_right() -> None:
    result = invoke("doctor", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    checks = {(check["backend"], check["dtype"]): check for check in report["checks"] if check["device"] == "cpu"}
    assert checks["reference", "float64"]["gradient_error"] < 1e-12
    assert all(check.get("passed", True) for check in report["checks"])
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["torch_threads"] == torch.get_num_threads()
    assert {"name": "reference", "device": "cpu", "available": True} in report["backends"]


def test_doctor_notices_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from embedgrad.cli import self_check

    def wrong(*arguments: Any) -> Any:
        loss, gradient = loss_and_grad(*arguments)
        return loss, gradient * 1.2

    monkeypatch.setattr(self_check, "loss_and_grad", wrong)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "WRONG" in result.stdout


def test_doctor_says_why_a_backend_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.backends, "NAMES", ("reference", "imagined"))
    report = doctor.examine()
    assert "imagined" in next(one["why_not"] for one in report["backends"] if one["name"] == "imagined")
    assert {check["backend"] for check in report["checks"]} == {"reference"}


@pytest.fixture
def task_folder(workplace: Path) -> Path:
    """Data and a configuration of the task causal_judgement."""
    rows = [
        {
            "input": f"Clerk {n} shut gate {n} and letter {n} was lost on day {n}. Did he?",
            "target": ["Yes", "No"][n % 2],
        }
        for n in range(30)
    ]
    (workplace / "data" / "causal_judgment").mkdir(parents=True)
    file = workplace / "data" / "causal_judgment" / "bigbench.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"path": str(model_folder()), "device": "cpu"},
        "prompt": "Yes or No?",  # the task's own is too long for the tiny model
        "data": {"task": "causal_judgement", "split": {"train": 12, "validation": 4, "test": 8}},
        "optimize": {"steps": 2, "monitors": {"gap": "ignore"}},
        "run": {"folder": str(workplace / "runs")},
    }
    (workplace / "task.yaml").write_text(yaml.safe_dump(config))
    return workplace


def test_optimize_and_evaluate_a_task(task_folder: Path) -> None:
    path, data = task_folder / "task.yaml", task_folder / "data"
    result = invoke("optimize", path, "--data", data, "--set", "data.grader=label")
    assert result.exit_code == 0
    assert "leakage check (train 12, validation 4, test 8): no text is in two parts" in result.stderr
    folder = task_folder / "runs" / "task"
    summary = read_summary(folder)
    assert (summary["task"], summary["grader"]["kind"], summary["test_examples"]) == ("causal_judgement", "label", 8)
    assert summary["leakage"]["clean"] is True
    for name in ("generated_accuracy", "choice_accuracy", "choice_normalised_accuracy", "choice_calibrated_accuracy"):
        assert 0 <= summary["mcnemar"][name]["p"] <= 1
        assert summary[name].keys() == {"before", "after"}
    assert 0 <= summary["answers"]["after"]["invalid"] <= 1
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["optimize"]["batch_size"] == 8  # the task's
    assert written["optimize"]["steps"] == 2  # the configuration's
    assert written["data"]["folder"] == str(data)
    again = invoke("evaluate", folder / "prompt.safetensors", "--config", folder / "config.yaml", "--before", "--json")
    figures = json.loads(again.stdout)["figures"]
    assert figures["mcnemar"] == summary["mcnemar"]
    assert figures["generated_accuracy"] == summary["generated_accuracy"]


def test_cross_validation_from_the_command_line(task_folder: Path) -> None:
    path, data = task_folder / "task.yaml", task_folder / "data"
    tested = []
    for fold in range(3):
        sets = ("--set", "data.folds=3", "--set", f"data.fold={fold}", "--set", f"run.name=fold-{fold}")
        invoke("optimize", path, "--quiet", "--data", data, *sets, "--set", "data.split={validation: 4}")
        records = json.loads((task_folder / "runs" / f"fold-{fold}" / "test.json").read_text())["after"]["records"]
        tested += [record["query"] for record in records]
    assert len(tested) == len(set(tested)) == 30


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.task=causal_judgment"], "there is no task 'causal_judgment'; did you mean 'causal_judgement'"),
        (
            ["data.variant=bbq"],
            "data.variant is 'bbq', but for the task causal_judgement it must be one of bigbench, bbh",
        ),
        (["data.path=x.jsonl"], "either the task causal_judgement or files of one's own"),
        (["data.task=jsonl"], "should give folder and variant for a task only"),
        (["data.fold=7", "data.folds=3"], "data.fold is 7"),
        (["data.folds=200"], "cannot be divided into 200 folds"),
        (["data.grader=maths"], "the grader is 'maths', but must be one of"),
        (["data.grader={kind: label, pattern: '('}"], "no regular expression"),
        (["data.split.train=500"], "500"),
        (["data.labels=['Yes']"], "target 'No', which is not one of Yes"),
    ],
)
def test_unusable_tasks_are_refused_in_words(task_folder: Path, overrides: list[str], words: str) -> None:
    sets = [part for override in overrides for part in ("--set", override)]
    with pytest.raises(EmbedGradError) as refusal:
        invoke("optimize", task_folder / "task.yaml", "--data", task_folder / "data", *sets)
    assert words in str(refusal.value)
    assert not (task_folder / "runs").exists()


def test_evaluate_says_what_it_needs(prompt_file: Path, workplace: Path) -> None:
    with pytest.raises(EmbedGradError, match="give the test data: --data FILE, --task NAME"):
        invoke("evaluate", prompt_file, "--model", model_folder())
    with pytest.raises(EmbedGradError, match="give the test data"):
        invoke("evaluate", prompt_file, "--task", "imdb", "--config", workplace / "first.yaml")
    with pytest.raises(EmbedGradError, match="give the model with --model"):
        invoke("evaluate", prompt_file, "--data", workplace / "data.jsonl")
    with pytest.raises(EmbedGradError, match="did you mean 'imdb'"):
        invoke("evaluate", prompt_file, "--task", "imbd", "--model", model_folder())
