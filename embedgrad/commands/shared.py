"""What several commands need: the model, a configuration with its task, and figures as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedgrad.errors import ConfigError
from embedgrad.evaluation import Evaluation, paired_tests
from embedgrad.evaluation import shares as evaluation_shares
from embedgrad.grading.grader import Grader, make_grader
from embedgrad.model.model import Model, load_model
from embedgrad.monitors import Judge
from embedgrad.sampling import Sampling
from embedgrad.settings import DataSection, FileSection, OptimizeConfig, PromptSection, RunConfig, expand_path
from embedgrad.statistics import Accuracy
from embedgrad.tasks import find_task
from embedgrad.tasks.jsonl import File, of_files
from embedgrad.tasks.parts import Division, Encoder, Parts, divide
from embedgrad.tasks.source import Source
from embedgrad.tasks.task import Pools, Task


def open_model(
    path: str,
    dtype: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    weights: str = "auto",
    max_device_memory: int | None = None,
) -> Model:
    """`load_model`, with ~ and $VARIABLES in `path` replaced; a path that does not exist may be a hub id."""
    return load_model(expand_path(path), dtype, backend, device, weights, max_device_memory)


def open_configured(config: RunConfig) -> Model:
    """The model of a configuration."""
    section = config.model
    return open_model(
        section.path, section.dtype, section.backend, section.device, section.weights, section.max_device_memory
    )


@dataclass(frozen=True)
class Plan:
    """A configuration whose task is found and whose data are read.

    config: with the task's prompt, template and settings wherever the user's say nothing. labels: all answers there
    are. sampling: None is greedy, as long as the targets need.
    """

    config: RunConfig
    task: Task
    pools: Pools
    labels: tuple[str, ...] | None
    grader: Grader
    sampling: Sampling | None
    prompt: str

    @property
    def judge(self) -> Judge:
        """How validations make and grade answers."""
        return Judge(self.grader, self.sampling)

    def parts(self, tokenizer: Encoder) -> Parts:
        """Training, validation and test data. Raises DataError, ConfigError."""
        return divide(self.task, self.pools, division(self.config.data), tokenizer)


def plan(config: RunConfig) -> Plan:
    """Finds the task and reads its data; nothing heavy yet. Raises ConfigError, DataError."""
    task = task_of(config.data)
    labels = task.labels if config.data.labels is None else config.data.labels
    grader = make_grader(task.grader if config.data.grader is None else config.data.grader, labels)
    source = Source.of(config.data.folder) if task.name != "jsonl" else Source(None)
    pools = task.load(source, config.data.variant)
    prompt = config.prompt or PromptSection(text=task.prompt)
    filled = config.model_copy(
        update={
            "prompt": prompt,
            "template": task.template if config.template is None else config.template,
            "optimize": with_defaults(config.optimize, task.optimize),
        }
    )
    return Plan(filled, task, pools, labels, grader, sampling_of(config, task), prompt_text(prompt))


def task_of(section: DataSection) -> Task:
    """The task of a configuration: one by its name, or its own files. Raises ConfigError."""
    if section.task is None or section.task == "jsonl":
        train = File(expand_path(section.path)) if section.path is not None else _file(section.train)
        assert train is not None  # DataSection sees to it
        return of_files(
            train, _file(section.validation), _file(section.test), section.query, section.target, section.labels,
            divided=section.path is not None,
        )  # fmt: skip
    task = find_task(section.task)
    if section.variant is not None and section.variant not in task.variants:
        known = f"one of {', '.join(task.variants)}" if task.variants else "left out, for there is only one"
        raise ConfigError(f"data.variant is {section.variant!r}, but for the task {task.name} it must be {known}.")
    return task


def division(section: DataSection) -> Division:
    """How a configuration divides its task's pools."""
    split = section.split
    return Division(
        None if split is None else {name: getattr(split, name) for name in ("train", "validation", "test")},
        0 if split is None else split.seed,
        section.folds,
        section.fold,
        section.query_tokens,
        section.target_tokens,
    )


def with_defaults(config: OptimizeConfig, defaults: Mapping[str, Any]) -> OptimizeConfig:
    """`config`, with a task's `defaults` for whatever was not said."""
    said = config.model_dump(exclude_unset=True)
    merged = {**defaults, **said}
    if isinstance(defaults.get("monitors"), Mapping) and "monitors" in said:
        merged["monitors"] = {**defaults["monitors"], **said["monitors"]}
    if "epochs" in said and "steps" not in said:
        merged.pop("steps", None)
    return OptimizeConfig(**merged)


def sampling_of(config: RunConfig, task: Task) -> Sampling | None:
    """How answers are generated: as the configuration says, else as long as the task says."""
    if config.sampling is not None:
        said = config.sampling.model_dump(exclude_unset=True)
        if task.max_new_tokens is not None:
            said.setdefault("max_new_tokens", task.max_new_tokens)
        return Sampling(**said)
    return None if task.max_new_tokens is None else Sampling(max_new_tokens=task.max_new_tokens)


def _file(section: FileSection | None) -> File | None:
    return None if section is None else File(expand_path(section.path), section.limit)


def prompt_text(section: PromptSection) -> str:
    """The prompt that a configuration gives. Raises ConfigError."""
    if section.text is not None:
        return section.text
    path = expand_path(section.file or "")
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the prompt file {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt file {path} is not UTF-8 text (byte {error.start}).") from error
    return text.removesuffix("\n").removesuffix("\r")


def write_text(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all. Raises SaveError."""
    from embedgrad.files import write_atomic

    write_atomic(path, text.encode())


def with_interval(accuracy: Accuracy | None) -> str:
    """A share with its 95 % interval: "0.895 (0.860 to 0.922)"; "-" where it was not measured."""
    return "-" if accuracy is None else f"{accuracy.value:.3f} ({accuracy.low:.3f} to {accuracy.high:.3f})"


def figures(tested: Mapping[str, Evaluation]) -> dict[str, Any]:
    """For a summary: each measure {before, after}, their 95 % intervals alike, the statistics of the answers, the
    number of test examples, and McNemar's test of before against after; empty without evaluations."""
    if not tested:
        return {}
    content: dict[str, Any] = {"test_examples": len(tested["after"].records), "intervals": {}}
    for name, shares in evaluation_shares(tested).items():
        content[name] = {when: share.value for when, share in shares.items()}
        content["intervals"][name] = {when: [share.low, share.high] for when, share in shares.items()}
    content["grader"] = tested["after"].grader
    content["answers"] = {when: evaluation.statistics.to_dict() for when, evaluation in tested.items()}
    if "before" in tested:
        tests = paired_tests(tested["before"], tested["after"])
        content["mcnemar"] = {name: asdict(test) for name, test in tests.items()}
    return content


def answers_told(evaluation: Evaluation) -> str:
    """The answers' statistics in a few words: "3.2 tokens, 12.0 % invalid, 0.0 % cut off"."""
    statistics = evaluation.statistics
    told = f"{statistics.tokens:.1f} tokens"
    if statistics.invalid is not None:
        told += f", {statistics.invalid:.1%} invalid"
    return told + f", {statistics.truncated:.1%} cut off, {statistics.loops:.1%} looping"
