"""`embedgrad distil`: plain texts that keep as much as possible of a tuned prompt's gain."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from embedgrad.cli.commands.shared import STOPPED, open_configured, open_model, with_folder, write_text
from embedgrad.cli.tables import tables
from embedgrad.cli.terminal import tell
from embedgrad.data.example import Example
from embedgrad.distil.distil import Distillation, Settings
from embedgrad.distil.judges import LocalJudge, RemoteJudge, TextJudge
from embedgrad.distil.openai_client import connect
from embedgrad.distil.result import FILE, Values, early_warning, header, listed, markdown, paragraph, result, rows
from embedgrad.engine.model import Model
from embedgrad.evaluation.evaluate import default_sampling
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.train.plan import Plan, plan
from embedgrad.train.settings import load_run_config
from embedgrad.util.errors import ConfigError
from embedgrad.util.folder_lock import locked
from embedgrad.util.interrupts import stop_on_signals
from embedgrad.util.shown import visible

KEY = "EMBEDGRAD_JUDGE_KEY"


@dataclass(frozen=True)
class Options:
    """The options of the command line; see `embedgrad distil --help`."""

    config: Path | None = None
    overrides: Sequence[str] = ()
    data: Path | None = None
    judge: str | None = None
    judge_model: str | None = None
    timeout: float = 60.0
    limit: int | None = None
    output: Path | None = None
    quiet: bool = False
    as_json: bool = False


def run(prompt_path: Path, options: Options, settings: Settings) -> int:
    """Runs the command. Returns its exit code. Raises EmbedGradError."""
    prompt = SoftPrompt.load(prompt_path)
    planned = plan_beside(prompt_path, options.config, options.overrides, options.data)
    folder = options.output or beside(prompt_path, "distil")
    model = open_configured(planned.config)
    prompt.check_model(model)
    parts = planned.parts(model.tokenizer)
    parts = replace(parts, validation=parts.validation[: options.limit])

    judge = _judge(options, planned, prompt, parts.validation, model)
    with locked(folder):
        return _distil(Distillation(planned, model, prompt, parts, settings, folder, judge), folder, options)


def _distil(done: Distillation, folder: Path, options: Options) -> int:
    """The work in a folder that is locked. Returns the exit code."""
    warned = False
    with stop_on_signals(terminate=True) as stop:
        for piece in done.pieces():
            if not (options.quiet or options.as_json):
                tell(piece)
            if not warned and (warnings := early_warning(done)):
                warned = True
                for warning in warnings:
                    tell(f"warning: {warning}")
            if stop.reason is not None:
                tell(f"Stopped; all of it is saved in {folder}, and the same command goes on from here.")
                return STOPPED[stop.reason]
    found = result(done)
    write_text(folder / FILE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "distil.md", markdown(found))
    best = next((one["text"] for one in found["texts"]), done.prompt.text)
    write_text(folder / "best.txt", best + "\n")
    if options.as_json:
        print(json.dumps(found, ensure_ascii=False))
    elif not options.quiet:
        _show(found, folder)
    return 0


def plan_beside(prompt: Path, config: Path | None, overrides: Sequence[str], data: Path | None) -> Plan:
    """The plan of a configuration: the given one, or the config.yaml of the run whose folder holds the prompt.

    Raises ConfigError where there is neither.
    """
    own = prompt.parent / "config.yaml"
    if config is None and not own.is_file():
        raise ConfigError(
            f"there is no configuration beside {prompt}, which would say what data to measure on; give one with "
            "--config FILE, such as that of the run that made the prompt."
        )
    return plan(load_run_config(config or own, with_folder(overrides, data)))


def beside(prompt: Path, name: str) -> Path:
    """The folder for what is made of a prompt: `name` in the folder of its run, else named after the file."""
    return prompt.parent / (name if prompt.name == "prompt.safetensors" else f"{prompt.stem}-{name}")


def _judge(
    options: Options, planned: Plan, prompt: SoftPrompt, validation: Sequence[Example], model: Model
) -> TextJudge | None:
    if options.judge is None:
        if options.judge_model is not None:
            raise ConfigError("--judge-model names a model at an address: give the address with --judge.")
        return None
    if options.judge.startswith(("http://", "https://")):
        client = connect(options.judge, options.judge_model, os.environ.get(KEY), options.timeout)
        sampling = planned.sampling or default_sampling(model, validation, planned.labels)
        if any(not isinstance(example.query, str) for example in validation):
            raise ConfigError("a judge at an address needs queries of text, but the validation data hold token ids.")
        return RemoteJudge(client, prompt.template, planned.grader, sampling.max_new_tokens)
    if options.judge_model is not None:
        raise ConfigError(f"--judge-model names a model at an address, but --judge is {shlex.quote(options.judge)}.")
    section = planned.config.model
    other = open_model(options.judge, section.dtype, section.backend, section.device)
    return LocalJudge(other, prompt.template, planned.labels, planned.sampling, planned.grader)


def _show(found: Values, folder: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False, file=sys.stdout)

    def show(text: str) -> None:
        console.print(visible(text), markup=False, soft_wrap=True)

    show(tables(list(zip(header(found), zip(*rows(found), strict=True), strict=True)), console.width) + "\n")
    for number, one in enumerate(listed(found)[:3], 1):
        show(f"{number}. {one['text']}")
    show("\n" + paragraph(found))
    for warning in found["warnings"]:
        show(f"warning: {warning}")
    show(f"Written to {folder}/: {FILE}, distil.md, best.txt")
