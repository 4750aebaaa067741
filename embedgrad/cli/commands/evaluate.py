"""`embedgrad evaluate`: evaluates a prompt file on a data file, or on the test data of a task or a configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedgrad.cli.commands.shared import (
    answers_told,
    figures,
    open_configured,
    open_model,
    with_folder,
    with_interval,
    write_text,
)
from embedgrad.data.example import Example
from embedgrad.data.readers import read_jsonl
from embedgrad.distributed.join import joined
from embedgrad.distributed.ranks import Ranks
from embedgrad.engine.model import Model
from embedgrad.evaluation.evaluate import MEASURES, Evaluation, evaluate, paired_tests
from embedgrad.evaluation.evaluate import shares as evaluation_shares
from embedgrad.evaluation.grading.grader import Grader
from embedgrad.evaluation.grading.registry import make_grader
from embedgrad.generation.sampling import Sampling
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.train.plan import Plan, plan
from embedgrad.train.settings import load_run_config, run_config
from embedgrad.util.errors import ConfigError
from embedgrad.util.files import check_target


@dataclass(frozen=True)
class Options:
    """The options of the command line; see `embedgrad evaluate --help`."""

    data: Path | None = None
    config: Path | None = None
    task: str | None = None
    labels: Sequence[str] = ()
    grader: str | None = None
    before: bool = False
    limit: int | None = None
    output: Path | None = None
    query_field: str = "query"
    target_field: str = "target"
    max_new_tokens: int | None = None
    as_json: bool = False


@dataclass(frozen=True)
class _Test:
    """The test data and how they are evaluated."""

    examples: list[Example]
    labels: tuple[str, ...] | None
    grader: Grader
    sampling: Sampling | None
    note: str | None  # result of the leakage check


def run(prompt_path: Path, model_path: str | None, computing: Sequence[Any], options: Options) -> None:
    """Runs the command. Raises EmbedGradError.

    computing: dtype, backend and device for the model in `model_path`; without that path the model is the
    configuration's.
    """
    with joined() as ranks:
        _run(ranks, prompt_path, model_path, computing, options)


def _run(ranks: Ranks, prompt_path: Path, model_path: str | None, computing: Sequence[Any], options: Options) -> None:
    if options.output is not None:
        check_target(options.output)
    if sum(given is not None for given in (options.config, options.task)) > 1 or not any(
        (options.config, options.task, options.data)
    ):
        raise ConfigError("give the test data: --data FILE, --task NAME (with --data FOLDER), or --config FILE.")
    planned = _plan(options, model_path)
    if model_path is not None:
        model = open_model(model_path, *computing)
    elif planned is not None and options.config is not None:
        model = open_configured(planned.config)
    else:
        raise ConfigError("give the model with --model (or a configuration that has one with --config).")
    prompt = SoftPrompt.load(prompt_path, model)
    test = _test(options, planned, model)
    prompts = {"before": prompt.replace(embeddings=prompt.anchor)} if options.before else {}
    prompts["after"] = prompt
    results = {
        when: evaluate(model, one, test.examples, test.labels, test.sampling, test.grader, ranks)
        for when, one in prompts.items()
    }
    if not ranks.leads:
        return
    source = options.data or options.config or options.task
    content: dict[str, Any] = {"prompt": str(prompt_path), "model": model.name, "data": str(source)}
    content |= (
        {when: result.to_dict() for when, result in results.items()} | {"figures": figures(results)}
        if options.before
        else results["after"].to_dict()
    )
    _show(content, results, test.note, options.as_json)  # before writing, so that the results show on a full disk too
    if options.output is not None:
        write_text(options.output, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _plan(options: Options, model_path: str | None) -> Plan | None:
    """The plan of a configuration or a task; None for the user's own file."""
    folder = with_folder((), options.data)
    if options.config is not None:
        return plan(load_run_config(options.config, folder))
    if options.task is not None:
        values = {"model": model_path or "", "data": {"task": options.task}}
        return plan(run_config(values, "the command line", folder))
    return None


def _test(options: Options, planned: Plan | None, model: Model) -> _Test:
    longest = options.max_new_tokens
    sampling = None if longest is None else Sampling(max_new_tokens=longest)
    if planned is None:
        assert options.data is not None
        examples = read_jsonl(options.data, options.query_field, options.target_field, options.limit)
        labels = tuple(options.labels) or None
        return _Test(examples, labels, make_grader(options.grader or "exact", labels), sampling, None)
    parts = planned.parts(model.tokenizer)
    labels = tuple(options.labels) or planned.labels
    grader = planned.grader if options.grader is None else make_grader(options.grader, labels)
    return _Test(parts.test[: options.limit], labels, grader, sampling or planned.sampling, parts.leakage.sentence())


def _show(content: Mapping[str, Any], results: Mapping[str, Evaluation], note: str | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(content, indent=2))
        return
    tests = paired_tests(results["before"], results["after"]) if "before" in results else {}
    for name, shares in evaluation_shares(results).items():
        told = f"{MEASURES[name]}: " + "; ".join(f"{when} {with_interval(share)}" for when, share in shares.items())
        if name in tests:
            told += f"; {tests[name].gained} gained, {tests[name].lost} lost, p = {tests[name].p:.2g}"
        print(told)
    print("answers: " + "; ".join(f"{when} {answers_told(result)}" for when, result in results.items()))
    if note is not None:
        print(note)
    print(f"{len(results['after'].records)} examples")
