"""Completes a configuration with the defaults of its task. Every command on a task begins with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedgrad.evaluation.grading.grader import Grader
from embedgrad.evaluation.grading.registry import make_grader
from embedgrad.generation.sampling import Sampling
from embedgrad.prompt.belonging import PromptModel
from embedgrad.prompt.conversation import dated
from embedgrad.prompt.prompt import SoftPrompt, default_template
from embedgrad.prompt.rendering import ModelLike
from embedgrad.prompt.template import Template
from embedgrad.tasks import find_task
from embedgrad.tasks.jsonl import File, of_files
from embedgrad.tasks.parts import Division, Encoder, Parts, divide
from embedgrad.tasks.source import Source
from embedgrad.tasks.task import Pools, Task
from embedgrad.train.monitors import Judge
from embedgrad.train.paths import expand_path
from embedgrad.train.settings import DataSection, FileSection, OptimizeConfig, PromptSection, RunConfig
from embedgrad.util.errors import ConfigError
from embedgrad.util.text import read_text, without_final_break


@dataclass(frozen=True)
class Plan:
    """A configuration with its task and its data.

    config: the user's configuration, with the task's prompt, template and settings where the user gives none.
    labels: all possible answers, or None.
    sampling: None: greedy, with enough tokens for the longest target.
    saved: the prompt file from which the optimisation starts; None: it starts from the text's own embeddings.
    date: the date that a chat template is told; None: today's.
    """

    config: RunConfig
    task: Task
    pools: Pools
    labels: tuple[str, ...] | None
    grader: Grader
    sampling: Sampling | None
    prompt: str
    saved: SoftPrompt | None = None
    date: str | None = None

    @property
    def judge(self) -> Judge:
        """How validations make and grade answers."""
        return Judge(self.grader, self.sampling)

    def parts(self, tokenizer: Encoder, fold: int | None = None) -> Parts:
        """Training, validation and test data. fold: None: the configuration's. Raises DataError, ConfigError."""
        section = self.config.data if fold is None else self.config.data.model_copy(update={"fold": fold})
        return divide(self.task, self.pools, division(section), tokenizer)

    def template(self, model: ModelLike) -> Template:
        """The template of the configuration, of the saved prompt, or the model's default, in this order."""
        given = self.config.template
        if self.saved is not None and (given is None or not given.has_messages):
            given = self.saved.template if given is None else given.completed(self.saved.template)
        return dated(default_template(model, given), model.tokenizer, self.date)

    def start(self, model: PromptModel) -> SoftPrompt:
        """The prompt with which an optimisation starts. Raises PromptError, TemplateError, ContextError."""
        template = self.template(model)
        if self.saved is None:
            return SoftPrompt.from_text(model, self.prompt, template)
        if template != self.saved.template:
            return self.saved.behind(model, template)
        self.saved.check_model(model)
        return self.saved


def plan(config: RunConfig) -> Plan:
    """Finds the task and reads its data, without opening a model. Raises ConfigError, DataError."""
    task = task_of(config.data)
    labels = task.labels if config.data.labels is None else config.data.labels
    grader = make_grader(task.grader if config.data.grader is None else config.data.grader, labels)
    source = Source.of(config.data.folder) if task.name != "jsonl" else Source(None)
    pools = task.load(source, config.data.variant)
    prompt = config.prompt or PromptSection(text=task.prompt)
    saved = saved_prompt(prompt)
    own = None if saved is not None else task.template
    given = config.template
    if given is not None and not given.has_messages and own is not None:
        given = given.completed(own)
    filled = config.model_copy(
        update={
            "prompt": prompt,
            "template": own if given is None else given,
            "optimize": with_defaults(config.optimize, task.optimize),
        }
    )
    text = prompt_text(prompt) if saved is None else saved.text
    return Plan(filled, task, pools, labels, grader, sampling_of(config, task), text, saved)


def task_of(section: DataSection) -> Task:
    """The task of a configuration: a task by its name, or one made of the user's files. Raises ConfigError."""
    if section.task is None or section.task == "jsonl":
        train = File(expand_path(section.path)) if section.path is not None else _file(section.train)
        assert train is not None  # DataSection has checked it
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
    """How the task's pools are split."""
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
    """`config` with a task's `defaults` for the settings that the user has not set."""
    said = config.model_dump(exclude_unset=True)
    merged = {**defaults, **said}
    if isinstance(defaults.get("monitors"), Mapping) and "monitors" in said:
        merged["monitors"] = {**defaults["monitors"], **said["monitors"]}
    if "epochs" in said and "steps" not in said:
        merged.pop("steps", None)
    return OptimizeConfig(**merged)


def sampling_of(config: RunConfig, task: Task) -> Sampling | None:
    """The configuration's sampling, with the task's max_new_tokens where the user has set none; None for neither."""
    if config.sampling is not None:
        said = config.sampling.model_dump(exclude_unset=True)
        if task.max_new_tokens is not None:
            said.setdefault("max_new_tokens", task.max_new_tokens)
        return Sampling(**said)
    return None if task.max_new_tokens is None else Sampling(max_new_tokens=task.max_new_tokens)


def _file(section: FileSection | None) -> File | None:
    return None if section is None else File(expand_path(section.path), section.limit)


def saved_prompt(section: PromptSection) -> SoftPrompt | None:
    """The prompt file that a configuration names, or None for a file or setting of text. Raises PromptError."""
    if section.file is None or expand_path(section.file).suffix.lower() != ".safetensors":
        return None
    return SoftPrompt.load(expand_path(section.file))


def prompt_text(section: PromptSection) -> str:
    """The text of the prompt in a configuration. Raises ConfigError where its file cannot be read."""
    if section.text is not None:
        return section.text
    return without_final_break(read_text(expand_path(section.file or ""), "the prompt file", ConfigError))
