"""`embedgrad optimize`: one run as a configuration file describes it, and the test figures before and after."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedgrad.commands.shared import MEASURES, examples, open_model, prompt_text, with_interval, write_text
from embedgrad.evaluation import Evaluation, check_evaluation, evaluate
from embedgrad.example import Example
from embedgrad.machine import peak_memory
from embedgrad.model.model import Model
from embedgrad.progress import Bar, JsonLines, Progress, Quiet
from embedgrad.prompt import SoftPrompt
from embedgrad.runs import read_summary, write_summary
from embedgrad.sampling import Sampling
from embedgrad.settings import expand_path, load_run_config
from embedgrad.train import OptimizeResult, optimize

_SHOWN = 3  # test examples in the report
_STOPPED = {"interrupted": 130, "terminated": 143}  # 128 + signal number, as shells have it


def run(config_path: Path, overrides: Sequence[str], resume: bool, quiet: bool, as_json: bool) -> int:
    """The command; returns its exit code. Raises EmbedGradError."""
    config = load_run_config(config_path, overrides)
    folder = expand_path(config.run.folder) / str(config.run.name)
    data = examples(config.data)
    text = prompt_text(config.prompt)
    section = config.model
    model = open_model(
        section.path, section.dtype, section.backend, section.device, section.weights, section.max_device_memory
    )
    prompt = SoftPrompt.from_text(model, text, config.template)
    sampling = None if config.sampling is None else Sampling(**config.sampling.model_dump())
    if data["test"]:  # refused now, not after the training
        check_evaluation(model, prompt, data["test"], config.data.labels)
    progress: Progress = JsonLines() if as_json else Quiet() if quiet else Bar()
    result = optimize(
        model, prompt, data["train"], data["validation"], config.optimize,
        run_dir=folder, resume=resume, progress=progress, description=config.model_dump(mode="json"),
        terminate_cleanly=True,
    )  # fmt: skip
    if result.stop_reason in _STOPPED:
        sets = "".join(f" --set {_quoted(one)}" for one in overrides)
        again = f"embedgrad optimize {shlex.quote(str(config_path))}{sets} --resume"
        print(f"Stopped after step {result.steps}, all of it saved; to go on: {again}", file=sys.stderr)
        return _STOPPED[result.stop_reason]
    tested = _test(model, prompt, result, data["test"], config.data.labels, sampling)
    if tested:
        content = {when: evaluation.to_dict() for when, evaluation in tested.items()}
        write_text(folder / "test.json", json.dumps(content, ensure_ascii=False) + "\n")
    summary = {**read_summary(folder), **_figures(tested), "peak_memory_bytes": peak_memory()}
    write_summary(folder, summary)
    if as_json:
        print(json.dumps({"kind": "summary", **summary}))
    elif not quiet:
        _report(result, tested, folder)
    return 0


def _quoted(text: str) -> str:
    """`text` as one word of a shell's command line, where nothing in it is expanded."""
    return "'" + text.replace("'", "'\"'\"'") + "'"


def _test(
    model: Model,
    prompt: SoftPrompt,
    result: OptimizeResult,
    test: Sequence[Example],
    labels: Sequence[str] | None,
    sampling: Sampling | None,
) -> dict[str, Evaluation]:
    """The test data before and after; empty without any."""
    if not test:
        return {}
    return {
        when: evaluate(model, one, test, labels=labels, sampling=sampling)
        for when, one in (("before", prompt), ("after", result.prompt))
    }


def _figures(tested: Mapping[str, Evaluation]) -> dict[str, Any]:
    """For the summary: each measure {before, after}, their 95 % intervals alike, and the number of test examples."""
    if not tested:
        return {}
    figures: dict[str, Any] = {"test_examples": len(tested["after"].records), "intervals": {}}
    for name in MEASURES:
        shares = {when: getattr(evaluation, name) for when, evaluation in tested.items()}
        if shares["after"] is not None:
            figures[name] = {when: share.value for when, share in shares.items()}
            figures["intervals"][name] = {when: [share.low, share.high] for when, share in shares.items()}
    return figures


def _report(result: OptimizeResult, tested: Mapping[str, Evaluation], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("", "before", "after")
    for name, told in MEASURES.items():
        shares = [getattr(evaluation, name) for evaluation in tested.values()]
        if any(shares):
            table.add_row(f"test: {told}", *map(with_interval, shares))
    if result.before is not None and result.after is not None:
        for name in ("accuracy", "loss"):
            table.add_row(f"validation: {name}", f"{result.before[name]:.4f}", f"{result.after[name]:.4f}")
    if table.row_count:
        console.print(table)
    if tested:
        pairs = list(zip(tested["before"].records, tested["after"].records, strict=True))
        for before, after in pairs[:_SHOWN]:
            told = f"{_short(before.query)}\n  expected {_short(after.target)}; before: {_short(before.generated)}; "
            console.print(told + f"after: {_short(after.generated)}", markup=False, soft_wrap=True)
    console.print(
        f"{result.steps} steps in {result.train_seconds:.1f} s ({result.stop_reason}); best prompt from step "
        f"{result.best_step}, lowest similarity {result.min_similarity:.4f}; weights unchanged.\n"
        f"The prompt is in {folder / 'prompt.safetensors'}",
        markup=False,
        soft_wrap=True,
    )


def _short(text: object) -> str:
    told = repr(text)
    return told if len(told) <= 100 else told[:97] + "..."
