"""`embedgrad sweep`: searches settings by many runs, tests the best one, and writes a page about all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from embedgrad.cli.commands.optimize import finish
from embedgrad.cli.commands.report import write_page
from embedgrad.cli.commands.shared import open_configured, stopped_by, with_folder, write_text
from embedgrad.cli.terminal import tell
from embedgrad.distributed.join import gpu_of
from embedgrad.distributed.place import find_place
from embedgrad.engine.model import Model
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.report.read import read_run
from embedgrad.report.sweep import build_sweep
from embedgrad.sweep.space import check_space, given
from embedgrad.sweep.study import alone
from embedgrad.sweep.worker import Sweep
from embedgrad.train.checks import check_parts
from embedgrad.train.paths import expand_path
from embedgrad.train.plan import plan
from embedgrad.train.run_folder import holds_run, read_summary
from embedgrad.train.settings import load_run_config
from embedgrad.util.errors import ConfigError
from embedgrad.util.interrupts import Stopped
from embedgrad.util.shown import visible

_EXAMPLES = 5  # test examples of each kind on the page


def run(config_path: Path, overrides: Sequence[str], data: Path | None, quiet: bool, together: int) -> int:
    """Runs the command. Returns its exit code. Raises EmbedGradError."""
    overrides = with_folder(overrides, data)
    config = load_run_config(config_path, overrides)
    if config.sweep is None:
        raise ConfigError(
            f"{config_path} has no section sweep; give one with parameters, such as sweep: {{parameters: "
            "{optimize.learning_rate: {low: 5e-4, high: 1e-2, log: true}}}."
        )
    check_space(config_path, overrides, config.sweep)
    planned = plan(config)
    folder = expand_path(config.run.folder) / f"{config.run.name}-sweep"
    place = find_place()
    if place is not None and torch.cuda.is_available():  # one worker for each GPU
        torch.cuda.set_device(gpu_of(place.local_rank, torch.cuda.device_count()))
    model = open_configured(config)
    parts = planned.parts(model.tokenizer)
    if not parts.validation:
        raise ConfigError("a sweep chooses by validation data: give data.validation, or a split with validation.")
    check_parts(planned, model, planned.start(model), parts)
    sweep = Sweep(planned, model, folder, config_path, overrides, (lambda _: None) if quiet else tell)
    try:
        sweep.work(together)
        with alone(folder):  # the workers end at the same time; one of them tests and writes
            return _end(sweep, model, quiet)
    except (KeyboardInterrupt, Stopped) as stopped:
        return stopped_by(stopped)


def _end(sweep: Sweep, model: Model, quiet: bool) -> int:
    """Test the winner, unless it has been tested, and write sweep.json and the page."""
    ranked = sweep.ranked()
    if not ranked:
        told = next((f": {trial.problem}" for trial in sweep.trials() if trial.problem), ".")
        raise ConfigError(f"no trial of the sweep in {sweep.folder} has come to its end{told}")
    winner = ranked[0]
    place = sweep.folder / winner.name
    if "leakage" not in read_summary(place):  # which `finish` writes
        planned = plan(sweep.config(given(winner.values, sweep.section), winner.name))
        best = SoftPrompt.load(place / "prompt.safetensors", model)
        finish(place, model, planned.start(model), best, planned.parts(model.tokenizer), planned)
    others = [trial for trial in sweep.trials() if trial not in ranked]
    entries = [asdict(trial) for trial in (*ranked, *others)]
    content = {"winner": winner.name, "trials": entries, "test": read_summary(place)}
    write_text(sweep.folder / "sweep.json", json.dumps(content, indent=1) + "\n")
    page = sweep.folder / "report.html"
    runs = {trial.name: read_run(sweep.folder / trial.name) for trial in (*ranked, *others)
            if holds_run(sweep.folder / trial.name)}  # fmt: skip
    write_page(build_sweep(entries, runs, winner.name, _EXAMPLES), page)
    if not quiet:
        print(visible(f"The best of {len(entries)} trials is {winner.name}; its prompt is in {place}/"))
        print(visible(f"Written: {sweep.folder}/sweep.json and report.html"))
    return 0
