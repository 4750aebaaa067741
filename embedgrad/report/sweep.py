"""The report on a sweep: all trials in a table and in pictures, then the winner as a run of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from embedgrad.report.content import NOTHING, Content, build
from embedgrad.report.curves import Line, Panel, overlays
from embedgrad.report.read import Run
from embedgrad.report.table import Table


def build_sweep(trials: Sequence[Mapping[str, Any]], runs: Mapping[str, Run], winner: str, examples: int) -> Content:
    """The report.

    trials: the entries of sweep.json, the best first. runs: the trials' runs by name, as far as they exist. winner: the
    name of the one that was tested.
    """
    section = build([runs[winner]], examples).sections
    shown = [runs[trial["name"]] for trial in trials if trial["name"] in runs]
    names = [run.name for run in shown]
    return Content(
        f"embedgrad: a sweep of {len(trials)} trials, won by {winner}", section, _table(trials, runs),
        [*_history(trials), *overlays(shown, names)],
    )  # fmt: skip


def _table(trials: Sequence[Mapping[str, Any]], runs: Mapping[str, Run]) -> Table:
    keys = list(dict.fromkeys(key for trial in trials for key in trial["values"]))
    rows = []
    for trial in trials:
        run = runs.get(trial["name"])
        figures = run.summary.get("validation", {}).get("after") if run is not None else None
        figures = figures if isinstance(figures, dict) else {}
        rows.append(
            [
                trial["name"], trial["state"],
                *(_cell(trial["values"][key]) if key in trial["values"] else NOTHING for key in keys),
                *(f"{figures[name]:.4f}" if name in figures else NOTHING for name in ("accuracy", "loss")),
                str(run.summary.get("steps", NOTHING)) if run is not None else NOTHING,
            ]
        )  # fmt: skip
    header = ["trial", "ended", *(key.removeprefix("optimize.") for key in keys), "accuracy", "loss", "steps"]
    note = (
        "Accuracy and loss are those of each trial's best validation, on which the winner was chosen; they flatter it. "
        "The test part was evaluated once, for the winner only."
    )
    return Table(header, rows, note)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _history(trials: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Each trial's validation loss in the order of the trials, and the lowest so far."""
    told = sorted((trial["number"], trial["loss"]) for trial in trials if trial.get("loss") is not None)
    if not told:
        return []
    numbers, losses = [number for number, _ in told], [loss for _, loss in told]
    lowest = [min(losses[: place + 1]) for place in range(len(losses))]
    lines = [Line("trial", numbers, losses, 0, points=True, faint=True), Line("lowest so far", numbers, lowest, 1)]
    return [Panel("history", "Validation loss of the trials", "loss in nats per target token", lines, across="trial")]
