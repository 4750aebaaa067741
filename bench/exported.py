"""Does a tuned prompt keep its accuracy in other programs?

The demo's prompt is exported, as a folder for transformers and as a GGUF file for llama.cpp. lm-evaluation-harness asks
our engine, transformers and llama.cpp's server the same test snippets of the demo, none of which the prompt was trained
on: by the answer that is generated, and by the likelier of the two labels, which llama.cpp's server does not tell for
chats. "Same answers" is the share of the generated answers that are those of our engine. `make demo` makes the prompt.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.markdown import table
from bench.harness.rows import Row, row
from bench.harness.worker import environment, serve, workers
from bench.harness.writers import llama_server

OURS, HF, LLAMA = "embedgrad lm-eval", "transformers, `hf` copy", "llama.cpp, `gguf` copy"
CHECKS = ("tests/harness/test_lm_eval.py::test_scores_and_answers_are_those_of_an_exported_copy",)
NAME, WORKER = "prompt", "llama.cpp"
TASKS = {  # what the harness' descriptions of the two tasks do not share
    "generated": (
        'output_type: generate_until\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}\n'
        "metric_list: [{metric: exact_match}]\n"
    ),
    "likelier": (
        'output_type: multiple_choice\ndoc_to_choice: [positive, negative]\ntarget_delimiter: ""\n'
        "metric_list: [{metric: acc}]\n"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    parser.add_argument("--prompt", type=Path, default=Path("runs/demo/prompt.safetensors"), help="default: the demo's")
    parser.add_argument("--items", type=int, default=100, help="test snippets (default 100)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worker", choices=(WORKER,), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> list[Row]:
    """Export and ask; the rows."""
    if args.worker:
        server, version = llama_server(args.path, 4, args.threads, port=0)
        serve({"version": version, "address": server.listening_address}, lambda request: {})
        return []
    missing = [name for name in ("lm_eval", "tenacity", "xllamacpp") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} is missing: `pip install -e '.[bench]'` brings it.")
    if not args.prompt.is_file():
        raise SystemExit(f"there is no {args.prompt}: `make demo` makes it, or name a prompt of the demo by --prompt.")
    items = 10 if args.quick else args.items
    with tempfile.TemporaryDirectory() as name:
        return _asked(Path(name), args.prompt.resolve(), items, args.threads)


def _asked(folder: Path, prompt: Path, items: int, threads: int) -> list[Row]:
    import embedgrad
    from embedgrad.tasks import smollm2

    model = smollm2.path()
    for to, out in (("hf", "copy"), ("gguf", "copy.gguf")):
        embedgrad.export(prompt, to=to, model=model, out=folder / out, names=[NAME], check=False)
    _write_tasks(folder, items)
    pretrained = f"pretrained={folder / 'copy'},dtype=float32"
    ours = [sys.executable, "-m", "embedgrad", "lm-eval", "--model_args", f"model={model},prompt={prompt}"]
    theirs = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--model_args", pretrained]
    version = f"transformers {importlib.metadata.version('transformers')}"
    both = tuple(TASKS)
    answers = {OURS: _evaluate(ours, folder, both, threads), HF: _evaluate(theirs, folder, both, threads)}
    with workers("exported", {LLAMA: ("--worker", WORKER, "--path", str(folder / "copy.gguf"))}, threads) as running:
        address = f"{running[LLAMA].ready['address']}/v1/chat/completions"
        chats = f"model={NAME},base_url={address},num_concurrent=4"
        command = [sys.executable, "-m", "lm_eval", "--model", "local-chat-completions", "--model_args", chats]
        answers[LLAMA] = _evaluate(command, folder, ("generated",), threads)
        versions = {OURS: f"embedgrad {embedgrad.__version__}", HF: version, LLAMA: running[LLAMA].ready["version"]}
    harness = f"lm-eval {importlib.metadata.version('lm-eval')}"
    about: dict[str, int | float | str] = {"items": items, "model": model.name, "harness": harness, "device": "cpu"}
    rows, right = [], {at: sample["filtered_resps"] for at, sample in answers[OURS]["generated"].items()}
    for contender, of_tasks in answers.items():
        for task, samples in of_tasks.items():
            metric = "exact_match" if task == "generated" else "acc"
            accuracy = sum(sample[metric] for sample in samples.values()) / len(samples)
            equal = sum(sample["filtered_resps"] == right[at] for at, sample in samples.items()) / len(samples)
            more = {"equal": equal} if task == "generated" else {}
            case = {"task": task, **about}
            rows.append(row("exported", contender, versions[contender], [accuracy], case=case, unit="accuracy", **more))
    return rows


def _write_tasks(folder: Path, items: int) -> None:
    """The demo's first test snippets, and the harness' descriptions of both ways to ask."""
    from embedgrad.tasks import movie_snippets
    from embedgrad.tasks.parts import Division, divide
    from embedgrad.tasks.source import Source

    task = movie_snippets.TASK
    test = divide(task, task.load(Source(None), None), Division(seed=0)).test[:items]
    lines = [json.dumps({"query": example.query, "label": example.target}) for example in test]
    (folder / "snippets.json").write_text("\n".join(lines) + "\n")
    for name, asks in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(folder / 'snippets.json'))}}}}}\n"
            f"test_split: test\ndoc_to_text: '{{{{query}}}}'\ndoc_to_target: '{{{{label}}}}'\n{asks}"
        )


def _evaluate(command: Sequence[str], folder: Path, tasks: Sequence[str], threads: int) -> dict[str, dict[int, Any]]:
    """What the harness recorded: a sample by the item's number, for each task."""
    out = Path(tempfile.mkdtemp(dir=folder))
    options = ["--include_path", str(folder), "--tasks", ",".join(tasks), "--apply_chat_template", "--batch_size", "1"]
    recorded = ["--output_path", str(out), "--log_samples"]
    env = {**environment(threads), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run([*command, *options, *recorded], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = {}
    for task in tasks:
        (path,) = out.rglob(f"samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        found[task] = {sample["doc_id"]: sample for sample in samples}
    return found


# ---- documents -------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`exported`: accuracy of each program."""
    cells: list[Sequence[object]] = []
    for contender in dict.fromkeys(one.contender for one in rows):
        own = {one.case["task"]: one for one in rows if one.contender == contender}
        generated, likelier = own["generated"], own.get("likelier")
        cells.append((
            contender, f"{generated.median:.2f}", f"{likelier.median:.2f}" if likelier else None,
            f"{generated.more['equal']:.0%}", generated.version,
        ))  # fmt: skip
    heads = ("program", "answer as generated", "likelier label", "same answers", "version")
    title = f"{rows[0].case['items']} test snippets, {rows[0].case['model']}, {rows[0].case['harness']}"
    return {"exported": f"{title}\n\n{table(heads, cells)}"}


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """None."""
    return {}
