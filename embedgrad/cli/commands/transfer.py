"""`embedgrad transfer`: what a tuned prompt is worth on another model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from embedgrad.cli.commands.distil import beside, plan_beside
from embedgrad.cli.commands.shared import open_configured, open_model, stopped_by, with_interval, write_text
from embedgrad.cli.tables import tables
from embedgrad.cli.terminal import tell
from embedgrad.compare.outcome import Outcome
from embedgrad.compare.runner import Runner
from embedgrad.compare.studies.pictures import BLUE, GREEN, GREY, ORANGE, VERMILION, save, style
from embedgrad.engine.model import Model
from embedgrad.evaluation.evaluate import evaluate
from embedgrad.evaluation.paired import gain
from embedgrad.evaluation.statistics import Accuracy, in_points
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.tasks.parts import Parts
from embedgrad.train.checkpoints import tensor_hash
from embedgrad.train.plan import Plan
from embedgrad.train.settings import ModelSection
from embedgrad.transfer.arms import TEXT, TRAINED, Starts
from embedgrad.transfer.carry import SHUFFLED, Bridge
from embedgrad.transfer.result import FILE, Values, header, markdown, paragraph, result, rows
from embedgrad.transfer.translators import NAMES
from embedgrad.util.errors import ConfigError
from embedgrad.util.folder_lock import locked
from embedgrad.util.interrupts import Stopped
from embedgrad.util.shown import visible

POINTS = 15  # validations of a training on the target, besides the one before the first step
COLOURS = {TEXT: GREY, SHUFFLED: VERMILION, "ridge": BLUE, "orthogonal": GREEN, "relative": ORANGE}


@dataclass(frozen=True)
class Options:
    """The options of the command line; see `embedgrad transfer --help`."""

    config: Path | None = None
    overrides: Sequence[str] = ()
    data: Path | None = None
    translators: Sequence[str] = NAMES
    steps: int | None = None
    accuracy: float | None = None
    limit: int | None = None
    output: Path | None = None
    quiet: bool = False
    as_json: bool = False


def run(prompt_path: Path, to: str, options: Options) -> int:
    """Runs the command. Returns its exit code. Raises EmbedGradError."""
    prompt = SoftPrompt.load(prompt_path)
    planned = plan_beside(prompt_path, options.config, options.overrides, options.data)
    if planned.config.data.folds:
        raise ConfigError("a transfer takes one division of the data, not folds: give data.split instead.")
    section = planned.config.model

    def say(text: str) -> None:
        if not (options.quiet or options.as_json):
            tell(text)

    with style():
        source = open_configured(planned.config)
        prompt.check_model(source)
        parts = planned.parts(source.tokenizer)  # the same items for both models, cut with this model's tokens
        if not parts.test or not parts.validation:
            raise ConfigError(
                "a transfer needs validation and test data: give data.validation and data.test, or a split."
            )
        target = open_model(to, section.dtype, section.backend, section.device)
        bridge = Bridge.build(source, prompt, target, list(options.translators))
        warnings = _gain_at_home(planned, source, prompt, parts)
        for warning in warnings:
            tell(f"warning: {warning}")
        about = _about(bridge, parts, warnings)
        ours = _plan_for(planned, bridge, to, options.steps, len(parts.train))
        folder = options.output or beside(prompt_path, f"transfer-{_file_name(target.name)}")
        runner = Runner(ours, target, folder / _arms_folder(ours, prompt, options), parts={0: parts})
        starts = Starts.of(bridge, ours.config.optimize.trust_region)
        chosen = starts.arms()
        runner.check(chosen)  # errors come now and not after hours
        outcomes: list[Outcome] = []
        try:
            with locked(folder):
                for arm in chosen:
                    for seed in runner.seeds(arm):
                        outcomes.append(runner.run(arm, seed, 0))
                        say(_told(outcomes[-1]))
        except (KeyboardInterrupt, Stopped) as stopped:
            return stopped_by(stopped)
        seeds = ours.config.compare.seeds
        curves = {name: [_curve(runner, name + TRAINED, seed) for seed in seeds] for name in starts.prompts}
        found = result(outcomes, curves, options.accuracy, about)
        write_text(folder / FILE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        write_text(folder / "transfer.md", markdown(found))
        save(_picture(found), folder / "transfer.svg")
    for name, start in starts.prompts.items():
        if name not in (TEXT, SHUFFLED):
            start.save(folder / f"{name}.safetensors")
    _show(found, folder, options)
    return 0


def _gain_at_home(planned: Plan, model: Model, prompt: SoftPrompt, parts: Parts) -> list[str]:
    """A sentence where the prompt's gain over its text on its own model is not known to be positive."""
    found = [
        evaluate(model, one, parts.validation, planned.labels, planned.sampling, planned.grader).correct(
            "generated_accuracy"
        )
        for one in (prompt.replace(embeddings=prompt.anchor.to(prompt.embeddings.dtype)), prompt)
    ]
    known = gain(*found)
    if known.low > 0:
        return []
    return [
        f"On its own model the prompt gains {in_points(known)} over its text on {len(parts.validation)} validation "
        "items: the interval is not above 0, so there may be nothing to transfer."
    ]


def _plan_for(planned: Plan, bridge: Bridge, to: str, steps: int | None, examples: int) -> Plan:
    """The plan of the runs on the target: the configuration's, with the target and the carried template."""
    config = planned.config
    section = ModelSection(path=to, **config.model.model_dump(include={"dtype", "backend", "device"}))
    optimize = config.optimize.model_copy(update={} if steps is None else {"steps": steps, "epochs": None})
    quiet = {"answers": 0, "train_examples": 0, "nearest": False}  # the curves need the validations' accuracy only
    often = {"validate_every": max(1, optimize.total_steps(examples) // POINTS), "patience": None}
    optimize = optimize.model_copy(update={**often, "monitors": optimize.monitors.model_copy(update=quiet)})
    filled = config.model_copy(update={"model": section, "template": bridge.text.template, "optimize": optimize})
    return replace(planned, config=filled, prompt=bridge.text.text, saved=None)


def _arms_folder(plan: Plan, prompt: SoftPrompt, options: Options) -> str:
    """The folder of the arms: another one for another prompt or other settings, so that none is taken for another."""
    settings = plan.config.model_dump(mode="json", include={"optimize", "compare"})
    told = [tensor_hash(prompt.embeddings, prompt.anchor), settings, sorted(options.translators), options.limit]
    return "arms-" + hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).name) or "model"


def _about(bridge: Bridge, parts: Parts, warnings: Sequence[str]) -> Values:
    return {
        "source": bridge.source.name, "target": bridge.target.name, "shared_tokens": bridge.shared,
        "source_tokens": len(bridge.prompt.token_ids), "target_tokens": len(bridge.text.token_ids),
        "fits": {one.name: None if one.fit is None else asdict(one.fit) for one in bridge.translators},
        "test_items": len(parts.test), "validation_items": len(parts.validation), "warnings": list(warnings),
    }  # fmt: skip


def _curve(runner: Runner, arm: str, seed: int) -> list[tuple[int, float]]:
    return [(r["step"], r["accuracy"]) for r in runner.records(arm, seed, 0) if r["kind"] == "validation"]


def _told(outcome: Outcome) -> str:
    generated = Accuracy.of(outcome.correct["generated_accuracy"])
    return f"{outcome.title}, seed {outcome.seed}: generated {with_interval(generated)} after {outcome.seconds:.0f} s"


def _picture(found: Values) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.4))
    for name, one in found["curves"].items():
        for number, curve in enumerate(one["curves"]):
            label = name if number == 0 else None
            axes.plot(*zip(*curve, strict=True), color=COLOURS[name], label=label, alpha=0.8, marker=".")
    for level in found["levels"]:
        axes.axhline(level, color=GREY, linewidth=0.5, linestyle=":")
    axes.set(xlabel=f"steps on {found['target']}", ylabel="validation accuracy")
    axes.legend(fontsize=8)
    return figure


def _show(found: Values, folder: Path, options: Options) -> None:
    from rich.console import Console

    if options.as_json:
        print(json.dumps(found, ensure_ascii=False))
    elif not options.quiet:
        console = Console(highlight=False)
        shown = tables(list(zip(header(found), zip(*rows(found), strict=True), strict=True)), console.width)
        written = f"Written to {folder}/: {FILE}, transfer.md, transfer.svg, and the transferred prompts"
        for text in (f"{shown}\n", paragraph(found), written):
            console.print(visible(text), markup=False, soft_wrap=True)
