"""`embedgrad compare`: a table of the optimised prompt and its controls on the same test items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from embedgrad.cli.commands.shared import open_configured, stopped_by, with_folder, with_interval, write_text
from embedgrad.cli.tables import tables
from embedgrad.cli.terminal import tell
from embedgrad.compare.arms import arms
from embedgrad.compare.outcome import Outcome
from embedgrad.compare.runner import Runner
from embedgrad.compare.table import columns, explanation, lines, markdown, to_json
from embedgrad.distributed.join import joined
from embedgrad.distributed.ranks import Ranks
from embedgrad.evaluation.statistics import Accuracy
from embedgrad.train.paths import expand_path
from embedgrad.train.plan import plan
from embedgrad.train.settings import load_run_config
from embedgrad.util.interrupts import Stopped
from embedgrad.util.shown import visible

SHOWN = ("generated_accuracy", "choice_accuracy")  # measures on the terminal; the files have all measures


def run(config_path: Path, overrides: Sequence[str], data: Path | None, quiet: bool, as_json: bool) -> int:
    """Runs the command. Returns its exit code. Raises EmbedGradError."""
    with joined() as ranks:
        return _run(ranks, config_path, with_folder(overrides, data), quiet or not ranks.leads, as_json and ranks.leads)


def _run(ranks: Ranks, config_path: Path, overrides: Sequence[str], quiet: bool, as_json: bool) -> int:
    planned = plan(load_run_config(config_path, overrides))
    section = planned.config.run
    folder = expand_path(section.folder) / f"{section.name}-compare"
    model = open_configured(planned.config)
    runner = Runner(planned, model, folder, ranks)
    chosen, notes = arms(runner.plan, model)
    notes.insert(0, runner.parts(runner.folds[0]).leakage.sentence() + ".")

    def say(text: str) -> None:
        if not (quiet or as_json):
            tell(text)

    for note in notes:
        say(note)
    runner.check(chosen)  # errors come now and not after hours
    outcomes: list[Outcome] = []
    try:
        for arm in chosen:
            for seed in runner.seeds(arm):
                for fold in runner.folds:
                    outcome = runner.run(arm, seed, fold, runner.budget(outcomes, fold))
                    outcomes.append(outcome)
                    if as_json:
                        print(json.dumps({"kind": "outcome", **vars(outcome)}), flush=True)
                    say(_told(outcome, len(runner.folds)))
            if ranks.leads:
                _write(folder, outcomes, notes)
    except (KeyboardInterrupt, Stopped) as stopped:
        return stopped_by(stopped, silent=not ranks.leads)
    if not (quiet or as_json):
        _show(outcomes)
        print(f"Written to {folder}/: compare.json, compare.md, and a folder for each arm")
    return 0


def _write(folder: Path, outcomes: Sequence[Outcome], notes: Sequence[str]) -> None:
    write_text(folder / "compare.json", json.dumps(to_json(outcomes), indent=1) + "\n")
    write_text(folder / "compare.md", markdown(outcomes, notes))


def _told(outcome: Outcome, folds: int) -> str:
    where = f", fold {outcome.fold}" if folds > 1 else ""
    generated = Accuracy.of(outcome.correct["generated_accuracy"])
    told = f"{outcome.title}, seed {outcome.seed}{where}: generated {with_interval(generated)}"
    if "choice_accuracy" in outcome.correct:
        told += f", likeliest label {with_interval(Accuracy.of(outcome.correct['choice_accuracy']))}"
    return told + f" after {outcome.seconds:.0f} s"


def _show(outcomes: Sequence[Outcome]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    shown = tables(columns(lines(outcomes), SHOWN), console.width)
    console.print(visible(f"{shown}\n"), markup=False, soft_wrap=True)
    console.print(visible(explanation(outcomes)), markup=False, soft_wrap=True)
