"""`embedgrad optimize`: runs the optimisation of a configuration file, and tests the prompt before and after."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedgrad.cli.commands.shared import (
    STOPPED,
    answers_told,
    figures,
    open_configured,
    with_folder,
    write_text,
)
from embedgrad.cli.progress import Bar, JsonLines
from embedgrad.cli.tables import tables
from embedgrad.cli.terminal import tell
from embedgrad.data.example import Example
from embedgrad.distributed.join import joined
from embedgrad.distributed.ranks import ALONE, Ranks
from embedgrad.engine.model import Model
from embedgrad.evaluation.evaluate import MEASURES, Evaluation, evaluate, paired_tests
from embedgrad.evaluation.evaluate import shares as evaluation_shares
from embedgrad.evaluation.statistics import in_percent
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.tasks.parts import Parts
from embedgrad.train.checks import check_parts
from embedgrad.train.loggers import open_loggers
from embedgrad.train.optimize import OptimizeResult, optimize
from embedgrad.train.paths import expand_path, seen_from
from embedgrad.train.plan import Plan, plan
from embedgrad.train.progress import Progress, Quiet, Several
from embedgrad.train.run_folder import read_summary, write_summary
from embedgrad.train.settings import load_run_config
from embedgrad.util.host import peak_memory
from embedgrad.util.shown import short

_SHOWN = 3  # test examples in the report


def run(
    config_path: Path,
    overrides: Sequence[str],
    data: Path | None,
    resume: bool,
    quiet: bool,
    as_json: bool,
    allow_other_bits: bool = False,
) -> int:
    """Runs the command. Returns its exit code. data: folder with the task's files. Raises EmbedGradError."""
    with joined() as ranks:
        return _run(ranks, config_path, with_folder(overrides, data), resume, quiet, as_json, allow_other_bits)


def _run(
    ranks: Ranks,
    config_path: Path,
    overrides: Sequence[str],
    resume: bool,
    quiet: bool,
    as_json: bool,
    allow_other_bits: bool,
) -> int:
    planned = plan(load_run_config(config_path, overrides))
    config = planned.config
    folder = expand_path(config.run.folder) / str(config.run.name)
    progress: Progress = Quiet() if not ranks.leads else JsonLines() if as_json else Quiet() if quiet else Bar()
    description = config.model_dump(mode="json")
    seen_from(folder, description)
    kinds = config.run.loggers if ranks.leads else ()
    loggers = open_loggers(kinds, folder, description, progress.note)  # errors come before slow work
    progress = Several(progress, *loggers) if loggers else progress
    model = open_configured(config)
    parts = planned.parts(model.tokenizer)
    prompt = planned.start(model)
    check_parts(planned, model, prompt, parts)  # errors come now and not after the training
    progress.note(parts.leakage.sentence() + ".")
    result = optimize(
        model, prompt, parts.train, parts.validation, config.optimize,
        run_dir=folder, resume=resume, progress=progress, description=description,
        terminate_cleanly=True, judge=planned.judge, allow_other_bits=allow_other_bits,
        ranks=ranks,
    )  # fmt: skip
    if result.stop_reason in STOPPED:
        if ranks.leads:
            tell(
                f"Stopped after step {result.steps}, all of it saved; to go on: {_again(config_path, overrides, ranks)}"
            )
        return STOPPED[result.stop_reason]
    tested, summary = finish(folder, model, prompt, result.prompt, parts, planned, ranks)
    if not ranks.leads:
        return 0
    if as_json:
        print(json.dumps({"kind": "summary", **summary}))
    elif not quiet:
        _report(result, tested, folder)
    return 0


def finish(
    folder: Path, model: Model, start: SoftPrompt, best: SoftPrompt, parts: Parts, planned: Plan, ranks: Ranks = ALONE
) -> tuple[dict[str, Evaluation], dict[str, Any]]:
    """Test a run's prompt before and after: (the evaluations, the values of summary.json). Rank 0 writes test.json and
    summary.json. start: the prompt with which the run began."""
    tested = _test(model, start, best, parts.test, planned, ranks)
    if not ranks.leads:
        return tested, {}
    if tested:
        content = {when: evaluation.to_dict() for when, evaluation in tested.items()}
        write_text(folder / "test.json", json.dumps(content, ensure_ascii=False) + "\n")
    about = {"task": planned.task.name, "leakage": parts.leakage.to_dict(), "peak_memory_bytes": peak_memory()}
    summary = {**read_summary(folder), **figures(tested), **about}
    write_summary(folder, summary)
    return tested, summary


def _again(config_path: Path, overrides: Sequence[str], ranks: Ranks) -> str:
    """The command that resumes the run."""
    sets = "".join(f" --set {_quoted(one)}" for one in overrides)
    command = f"embedgrad optimize {shlex.quote(str(config_path))}{sets} --resume"
    return command if ranks.size == 1 else f"{command}, on {ranks.size} processes as before"


def _quoted(text: str) -> str:
    """`text` quoted as one word for a shell, which expands nothing in it."""
    return "'" + text.replace("'", "'\"'\"'") + "'"


def _test(
    model: Model, start: SoftPrompt, best: SoftPrompt, test: Sequence[Example], planned: Plan,
    ranks: Ranks,
) -> dict[str, Evaluation]:  # fmt: skip
    """The evaluations on the test data, "before" and "after"; empty without test data."""
    if not test:
        return {}
    return {
        when: evaluate(
            model, one, test, labels=planned.labels, sampling=planned.sampling, grader=planned.grader, ranks=ranks
        )
        for when, one in (("before", best.replace(embeddings=start.embeddings)), ("after", best))
    }


def _report(result: OptimizeResult, tested: Mapping[str, Evaluation], folder: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    rows: list[tuple[str, ...]] = []
    if tested:
        tests = paired_tests(tested["before"], tested["after"])
        for name, shares in evaluation_shares(tested).items():
            paired = tests[name]
            cells = [*map(in_percent, shares.values()), f"+{paired.gained} −{paired.lost}", f"{paired.p:.2g}"]
            rows.append((f"test: {MEASURES[name]}", *cells))
    if result.before is not None and result.after is not None:
        for name in ("accuracy", "loss"):
            rows.append((f"validation: {name}", f"{result.before[name]:.4f}", f"{result.after[name]:.4f}", "", ""))
    if rows:
        headings = ("", "before", "after", "gained, lost", "p (McNemar)")
        shown = tables(list(zip(headings, zip(*rows, strict=True), strict=True)), console.width)
        console.print(f"{shown}\n", markup=False, soft_wrap=True)
    for when, evaluation in tested.items():
        console.print(f"answers {when}: {answers_told(evaluation)}", markup=False, soft_wrap=True)
    if tested:
        pairs = list(zip(tested["before"].records, tested["after"].records, strict=True))
        for before, after in pairs[:_SHOWN]:
            texts = (before.query, after.target, before.generated, after.generated)
            query, target, first, last = (short(text, 100) for text in texts)
            told = f"{query}\n  expected {target}; before: {first}; after: {last}"
            console.print(told, markup=False, soft_wrap=True)
    console.print(
        f"{result.steps} steps in {result.train_seconds:.1f} s ({result.stop_reason}); best prompt from step "
        f"{result.best_step}, lowest similarity {result.min_similarity:.4f}; weights unchanged.\n"
        f"The prompt is in {folder / 'prompt.safetensors'}",
        markup=False,
        soft_wrap=True,
    )
