"""`embedgrad study`: answers a question of the paper by runs on the user's model and data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from embedgrad.cli.commands.shared import open_configured, stopped_by, with_folder, write_text
from embedgrad.cli.terminal import tell
from embedgrad.compare.runner import Runner
from embedgrad.compare.studies import NAMES, find_study
from embedgrad.compare.studies.pictures import save, style
from embedgrad.compare.studies.prompt_quality import STARTS, WAYS, Grid
from embedgrad.compare.studies.prompt_quality import run as run_on_grid
from embedgrad.compare.studies.study import Study
from embedgrad.distributed.join import joined
from embedgrad.distributed.ranks import Ranks
from embedgrad.engine.model import Model
from embedgrad.train.paths import expand_path
from embedgrad.train.plan import Plan, plan
from embedgrad.train.settings import load_run_config
from embedgrad.util.errors import ConfigError
from embedgrad.util.interrupts import Stopped
from embedgrad.util.shown import visible


@dataclass(frozen=True)
class Chosen:
    """The options of prompt-quality; see `embedgrad study --help`."""

    starts: Sequence[str] = ()
    arms: Sequence[str] = ()
    full: bool = False


def run(
    name: str, config_path: Path, overrides: Sequence[str], data: Path | None, output: Path | None,
    chosen: Chosen | None = None,
) -> int:  # fmt: skip
    """Runs the command. Returns its exit code. name: name of a study, or "all". Raises EmbedGradError."""
    with joined() as ranks:
        return _run(ranks, name, config_path, with_folder(overrides, data), output, chosen or Chosen())


def _run(
    ranks: Ranks, name: str, config_path: Path, overrides: Sequence[str], output: Path | None, chosen: Chosen
) -> int:
    studies = {one: find_study(one) for one in (NAMES if name == "all" else (name,))}
    if "prompt-quality" not in studies and chosen != Chosen():
        raise ConfigError("--start, --arm and --full choose the runs of the study prompt-quality; no other has them.")
    planned = plan(load_run_config(config_path, overrides))
    if "prompt-quality" in studies:
        studies["prompt-quality"] = _on_grid(studies["prompt-quality"], planned, name, chosen, ranks.leads)
    section = planned.config.run
    runs = expand_path(section.folder)
    folder = output or runs / f"{section.name}-studies"
    with style():
        model = open_configured(planned.config)
        runner = Runner(planned, model, runs / f"{section.name}-compare", ranks)
        pages = []
        try:
            for one, study in studies.items():
                found = study.run(runner)
                if not ranks.leads:
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                content = {"study": one, "model": model.name, "test_items": len(runner.parts(0).test), **found.data}
                write_text(folder / f"{one}.json", json.dumps(content, indent=1) + "\n")
                save(found.figure, folder / f"{one}.svg")
                told = "\n\n".join(text for text in (found.paragraph, found.table) if text)
                pages.append(f"## {one}: {study.question}\n\n{told}\n\n![{one}]({one}.svg)\n")
                write_text(folder / f"{one}.md", pages[-1])
                print(visible(f"{one}: {found.paragraph}\n"), flush=True)
        except (KeyboardInterrupt, Stopped) as stopped:
            return stopped_by(stopped, silent=not ranks.leads)
    if not ranks.leads:
        return 0
    if name == "all":
        write_text(folder / "studies.md", _together(planned, model, len(runner.parts(0).test), pages))
    print(f"Written to {folder}/: for each study its data (.json), a picture (.svg) and a paragraph (.md)")
    return 0


def _on_grid(study: Study, planned: Plan, name: str, chosen: Chosen, leads: bool) -> Study:
    """prompt-quality with the chosen runs. Beside all other studies, which have one seed, it has one, too, if not
    `full`."""
    seeds = planned.config.compare.seeds
    grid = Grid(
        chosen.starts or STARTS, chosen.arms or WAYS, seeds if name != "all" or chosen.full else seeds[:1],
        tell if leads else lambda text: None,
    )  # fmt: skip
    return replace(study, run=lambda runner: run_on_grid(runner, grid))


def _together(planned: Plan, model: Model, items: int, pages: Sequence[str]) -> str:
    """A page with all studies, which begins with their task, model and settings."""
    config = planned.config.optimize
    told = (
        f"Task {planned.task.name}, model {model.name}, {items} test items, prompt: {planned.prompt!r}. One seed each; "
        f"batches of {config.batch_size}, learning rate {config.learning_rate:g} unless it says otherwise. "
        "Intervals are 95 % Wilson intervals."
    )
    return "\n".join(["# Studies", "", told, "", *pages])
