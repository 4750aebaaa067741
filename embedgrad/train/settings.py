"""The settings of a run: `OptimizeConfig` for the optimisation, `RunConfig` for a configuration file.

An invalid setting raises a ConfigError, whose one sentence names the key, its value and the allowed values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from embedgrad.maths.trust_region import KINDS, CosineCone, TrustRegion
from embedgrad.prompt.template import Template
from embedgrad.train.hints import hint
from embedgrad.train.paths import count_from
from embedgrad.train.yaml_text import read_yaml
from embedgrad.util.errors import ConfigError, TemplateError
from embedgrad.util.shown import cut, short, visible
from embedgrad.util.text import read_text, without_final_break

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_LONGEST = 40  # characters of a number that is given as text
_SHOWN = 4  # wrong keys that a message lists; further ones are only counted


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    if isinstance(value, (int, str)) and _is_beyond(value):
        raise ValueError("should be a number below 2^64")
    return value


def _is_beyond(value: int | str) -> bool:
    """Whether a whole number is larger than any that counts something; texts of digits are numbers too."""
    return len(value) > _LONGEST if isinstance(value, str) else value.bit_length() > 64


def _bytes(value: object) -> object:
    if not isinstance(value, str):
        return _not_bool(value)
    match = None if len(value) > _LONGEST else re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", value.lower())
    if match is None:
        raise ValueError("should be a number of bytes, or a text such as 800MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _size(value: object) -> object:
    """A number of examples, or a fraction above 0 and below 1."""
    if isinstance(value, str):
        percent = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value)
        value = float(percent[1]) / 100 if percent is not None else value
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not whole and not (isinstance(value, float) and 0 < value < 1):
        raise ValueError(f"{value!r} should be a whole number of examples, or a fraction such as 0.8 of them")
    return value


def _folder_name(value: str) -> str:
    if not value.strip() or value in (".", "..") or any(sign in value for sign in "/\\\0"):
        raise ValueError(f"should be the name of one folder, not {short(value)}")
    return value


def _listed(value: object) -> object:
    """A list; a single name becomes a list of one."""
    return [value] if isinstance(value, str) else value


def _region(value: object) -> object:
    """A trust region, from a trust region, a kind such as "none", or a mapping with `kind` and its numbers."""
    if isinstance(value, str):
        value = {"kind": value}
    if isinstance(value, Mapping):
        try:
            return TrustRegion.from_dict(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
    return value


def _template(value: object) -> object:
    """A template, from a template, a kind such as "plain", or a mapping for Template.from_json.

    None and "system" give None, for the task's or the model's default.
    """
    if value is None or value == "system" or isinstance(value, Template):
        return None if value == "system" else value
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        raise ValueError('should be "system", "plain", or a mapping with messages or text')
    try:
        return Template.from_json(value)
    except TemplateError as error:
        raise ValueError(str(error)) from error


Wording = Annotated[str, AfterValidator(without_final_break)]  # a prompt's text; YAML's block scalars end with a break
Int = Annotated[int, BeforeValidator(_not_bool)]
Float = Annotated[float, BeforeValidator(_not_bool)]
Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=1)]
Size = Annotated[int | float, BeforeValidator(_size)]
Share = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, lt=1)]
Region = Annotated[
    TrustRegion, BeforeValidator(_region), PlainSerializer(lambda region: region.describe(), return_type=dict[str, Any])
]


class _RefusesInWords(ModelMetaclass):
    """Turns pydantic's error into a ConfigError where a section is made directly, as in `OptimizeConfig(steps=0)`.

    pydantic makes the inner sections itself, so the error of the outermost section has the whole path of the key.
    """

    def __call__(cls, *arguments: Any, **values: Any) -> Any:
        try:
            return super().__call__(*arguments, **values)
        except ValidationError as error:
            raise ConfigError(_sentence(error, cls)) from None  # type: ignore[arg-type]


class _Section(BaseModel, metaclass=_RefusesInWords):
    """A section of the configuration: immutable, without unknown keys, with finite numbers only."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class AlarmSection(_Section):
    """Threshold of an alarm and the action that follows. A name alone is the action, with the default threshold."""

    threshold: Float
    action: Literal["warn", "stop", "ignore"] = "warn"


def _alarm(threshold: float) -> BeforeValidator:
    def filled(value: object) -> object:
        value = {"action": value} if isinstance(value, str) else value
        return {"threshold": threshold, **value} if isinstance(value, Mapping) else value

    return BeforeValidator(filled)


class MonitorSection(_Section):
    """The figures that are recorded (`embedgrad.train.monitors`) and the alarms (`embedgrad.train.alarms`)."""

    similarity: Annotated[AlarmSection, _alarm(0.90)] = AlarmSection(threshold=0.90)
    gap: Annotated[AlarmSection, _alarm(0.15)] = AlarmSection(threshold=0.15)
    collapse: Annotated[AlarmSection, _alarm(0.05)] = AlarmSection(threshold=0.05)
    train_examples: Annotated[Int, Field(ge=0)] = 64  # training examples for the gap to validation accuracy; 0: off
    answers: Annotated[Int, Field(ge=0)] = 16  # validation examples for the statistics of generated answers; 0: off
    nearest: bool = True  # record the nearest tokens of the vocabulary at each validation


class OptimizeConfig(_Section):
    """How a prompt is optimised. Immutable. Values outside their range raise ConfigError."""

    steps: Annotated[Int, Field(ge=1)] | None = None  # optimiser steps; give steps or epochs
    epochs: Annotated[Int, Field(ge=1)] | None = None  # passes over the training data; default without steps: 1
    batch_size: Annotated[Int, Field(ge=1)] = 16
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[Float, Field(gt=0, le=1e6)] = 2e-3
    betas: tuple[Share, Share] = (0.9, 0.999)  # adamw
    eps: Annotated[Float, Field(gt=0)] = 1e-8  # adamw
    momentum: Share = 0.0  # sgd
    weight_decay: Annotated[Float, Field(ge=0, le=1e6)] = 0.0  # towards zero, not towards the anchor
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[Int, Field(ge=0)] = 0
    clip_norm: Annotated[Float, Field(gt=0)] | None = None  # upper bound for the Euclidean norm of the whole gradient
    trust_region: Region = CosineCone()
    validate_every: Annotated[Int, Field(ge=1)] | None = None  # steps; default: a tenth of the run
    select_by: Literal["accuracy", "loss"] = "accuracy"  # between equal accuracies the lower loss decides
    accuracy_by: Literal["auto", "forced", "generated"] = "auto"  # auto: generated answers where the grader needs them
    patience: Annotated[Int, Field(ge=1)] | None = None  # stop after this many validations without a better one
    checkpoint_every: Annotated[Int, Field(ge=1)] = 10  # steps
    seed: Annotated[Int, Field(ge=0)] = 0
    memory_policy: Literal["auto", "all", "mlp", "layer"] = "auto"
    memory_budget: Bytes | None = None  # bytes, or a text such as "2GiB"
    save_last: bool = True  # also save the prompt of the last step
    monitors: MonitorSection = MonitorSection()

    @model_validator(mode="after")
    def _one_length(self) -> OptimizeConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are two ways to say one thing: give one of them")
        return self

    def total_steps(self, examples: int) -> int:
        """Number of optimiser steps of a run over `examples` training examples."""
        return self.steps if self.steps is not None else (self.epochs or 1) * self.steps_per_epoch(examples)

    def steps_per_epoch(self, examples: int) -> int:
        """Number of batches in a pass over `examples` training examples. The last batch may be smaller."""
        return -(-examples // self.batch_size)

    def validation_interval(self, examples: int) -> int:
        """Number of steps from one validation to the next."""
        return self.validate_every or max(1, self.total_steps(examples) // 10)


class ModelSection(_Section):
    """The model and how it computes: the arguments of `load_model`."""

    path: str
    dtype: Literal["float32", "fp32", "float64", "fp64", "bfloat16", "bf16"] | None = None
    backend: str = "auto"
    device: str = "auto"
    weights: Literal["auto", "compute", "stored", "fp32", "bf16", "int8", "int4"] = "auto"
    max_device_memory: Bytes | None = None  # bytes, or a text such as "10GiB"; layers that do not fit are streamed
    long_context: bool = False


class PromptSection(_Section):
    """The text that is optimised, or a file that holds it. A line break at the end is removed."""

    text: Wording | None = None
    file: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> PromptSection:
        if (self.text is None) == (self.file is None):
            raise ValueError("should give either text or file")
        return self


class FileSection(_Section):
    """A JSON-lines file of examples, one object per line."""

    path: str
    limit: Annotated[Int, Field(ge=1)] | None = None  # use only the first `limit` examples


class SplitSection(_Section):
    """Number of examples in each part, or its fraction of all (below 1), drawn by the seed.

    Default: the task's number; for the user's own file 0.
    """

    train: Size | None = None
    validation: Size | None = None
    test: Size | None = None
    seed: Annotated[Int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _some_data(self) -> SplitSection:
        if self.train == 0:
            raise ValueError("train is 0, but should be at least one example")
        if sum(size for size in (self.train, self.validation, self.test) if isinstance(size, float)) > 1 + 1e-9:
            raise ValueError("the fractions of train, validation and test add up to more than 1")
        return self


class DataSection(_Section):
    """The data: a `task` by its name, or the user's own JSON-lines files.

    Own files are either one file each for train, validation and test, or one `path` with a `split` or `folds`.
    """

    task: str | None = None  # imdb, causal_judgement, math500, movie-snippets; jsonl or None: the user's own files
    variant: str | None = None  # variant of the task's data
    folder: str | None = None  # folder with the task's files; default: EMBEDGRAD_DATA, else the Hugging Face hub
    train: FileSection | None = None
    validation: FileSection | None = None
    test: FileSection | None = None
    path: str | None = None
    split: SplitSection | None = None
    folds: Annotated[Int, Field(ge=2)] | None = None  # number of folds for cross-validation
    fold: Annotated[Int, Field(ge=0)] = 0  # index of the fold that is the test data
    query_tokens: Annotated[Int, Field(ge=1)] | None = None  # queries are truncated to this many tokens
    target_tokens: Annotated[Int, Field(ge=1)] | None = None  # training examples with longer targets are dropped
    query: str = "query"
    target: str = "target"
    labels: tuple[str, ...] | None = None  # all possible answers; with them tests also score the labels
    grader: str | dict[str, Any] | None = None  # what makes an answer right (`evaluation.grading`); default: exact

    @model_validator(mode="before")
    @classmethod
    def _names_of_files(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        parts = ("train", "validation", "test")
        return {k: {"path": v} if k in parts and isinstance(v, str) else v for k, v in values.items()}

    @model_validator(mode="after")
    def _one_way(self) -> DataSection:
        own = (self.train, self.validation, self.test, self.path)
        if self.task is not None and self.task != "jsonl":
            if any(file is not None for file in own):
                raise ValueError(f"should give either the task {self.task} or files of one's own, not both")
            return self
        if self.folder is not None or self.variant is not None:
            raise ValueError("should give folder and variant for a task only; files have their own paths")
        if self.folds is not None and self.path is None:
            raise ValueError("should give folds for a task, or for a path")
        if (self.path is None) == (self.train is None):
            raise ValueError("should give either train (a file), or path and split")
        if (self.path is None) != (self.split is None and self.folds is None):
            raise ValueError("should give path and split together")
        if self.path is not None and self.folds is None and (self.split is None or self.split.train is None):
            raise ValueError("split.train is missing")
        if self.path is not None and (self.validation is not None or self.test is not None):
            raise ValueError("should give either files for validation and test, or path and split")
        return self


class RunSection(_Section):
    """The run folder, `folder`/`name`, and the `loggers` (`embedgrad.train.loggers`).

    The default name is that of the configuration file without its suffix.
    """

    name: Annotated[str, AfterValidator(_folder_name)] | None = None
    folder: str = "runs"
    loggers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_listed)] = ()


class CompareSection(_Section):
    """The settings of `embedgrad compare`."""

    arms: tuple[str, ...] | None = None  # default: all arms
    seeds: Annotated[tuple[Annotated[Int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    taus: tuple[Annotated[Float, Field(ge=-1, le=1)], ...] = (1.0, 0.99, 0.95, 0.9, 0.8, 0.0)
    shots: Annotated[Int, Field(ge=1)] = 4  # demonstrations in a few-shot prompt
    paraphrases: tuple[Wording, ...] | None = None  # other wordings of the prompt; default: the task's


class RangeSection(_Section):
    """Numbers from `low` to `high`; whole ones where both are whole. log: small ones as often as large ones."""

    low: Annotated[int | float, BeforeValidator(_not_bool)]
    high: Annotated[int | float, BeforeValidator(_not_bool)]
    log: bool = False
    step: Annotated[int | float, BeforeValidator(_not_bool), Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> RangeSection:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low}, but should be below high, which is {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("should have a low above 0 and no step where log is true")
        return self


def _values(value: object) -> object:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError("should be a list of values, or a mapping with low and high")
    return value


class SweepSection(_Section):
    """The settings of `embedgrad sweep`. parameters: for each setting, such as optimize.learning_rate, a list of values
    or a range."""

    parameters: Annotated[
        dict[str, RangeSection | Annotated[tuple[Any, ...], BeforeValidator(_values)]], Field(min_length=1)
    ]
    trials: Annotated[Int, Field(ge=1)] = 20
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    pruner: Literal["median", "halving", "none"] = "median"
    unpruned: Annotated[Int, Field(ge=1)] = 4  # trials that end before the first one may be pruned
    seed: Annotated[Int, Field(ge=0, lt=1 << 32)] = 0
    storage: str | None = None  # a database's URL; default: a file in the sweep's folder


class SamplingSection(_Section):
    """How answers are generated; the fields are those of `embedgrad.generation.sampling.Sampling`."""

    max_new_tokens: Annotated[Int, Field(ge=1)] = 256
    temperature: Annotated[Float, Field(ge=0)] = 0.0
    top_k: Annotated[Int, Field(ge=0)] = 0
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[Float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[Int, Field(ge=0, lt=1 << 64)] = 0
    stop: tuple[str, ...] = ()
    repetition_penalty: Annotated[Float, Field(gt=0)] = 1.0
    presence_penalty: Float = 0.0
    frequency_penalty: Float = 0.0
    logit_bias: dict[Int, Float] = {}
    choices: tuple[str, ...] = ()


class RunConfig(_Section):
    """A configuration file of `embedgrad optimize`."""

    model: ModelSection
    prompt: PromptSection | None = None  # default: the task's
    template: Annotated[
        Template | None, BeforeValidator(_template), PlainSerializer(lambda t: t and yaml.safe_load(t.to_json()))
    ] = None
    data: DataSection
    optimize: OptimizeConfig = OptimizeConfig()
    run: RunSection = RunSection()
    compare: CompareSection = CompareSection()
    sweep: SweepSection | None = None
    sampling: SamplingSection | None = None  # default: greedy, with enough tokens for the longest target

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {k: {_SHORT[k]: v} if k in _SHORT and isinstance(v, str) else v for k, v in values.items()}

    @model_validator(mode="after")
    def _some_prompt(self) -> RunConfig:
        if self.prompt is None and self.data.task in (None, "jsonl"):
            raise ValueError("prompt is missing")
        return self


# `model: X` is short for `model: {path: X}`, and so on. An override such as model.dtype expands the short form.
_SHORT = {"model": "path", "prompt": "text", "trust_region": "kind"}
_SHORT |= dict.fromkeys(("train", "validation", "test"), "path")
_SHORT |= dict.fromkeys(("similarity", "gap", "collapse"), "action")


def load_run_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies overrides such as "optimize.steps=30", whose values are YAML.

    Relative paths in the file count from its folder, those of overrides from the current folder. An override may name
    an item of a list by its index, as in "data.labels.0=yes", and one more than the list has.

    Raises ConfigError for a file that is missing or not YAML, an unknown key (with the nearest known one), or an
    invalid value.
    """
    path = Path(path)
    values = read_yaml(read_text(path, "the configuration", ConfigError), f"the configuration {path}")
    if not isinstance(values, dict):
        raise ConfigError(f"the configuration {path} should be a mapping with model, prompt and data.")
    try:
        count_from(path.parent, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    config = run_config(values, str(path), overrides)
    if config.run.name is None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": path.stem})})
    return config


def run_config(values: dict[Any, Any], where: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration with these values and overrides. `where` begins the message of a ConfigError."""
    for override in overrides:
        _override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_sentence(error, RunConfig)}") from None


def _override(values: dict[Any, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    names = key.strip().split(".")
    if not separator or not all(names):
        raise ConfigError(f"--set {short(override)} should look like section.key=value, for example optimize.steps=30.")
    value = read_yaml(text, f"the value of --set {short(override)}")
    section: Any = values
    for name in names[:-1]:
        place = _item(section, name, override)
        inner = section[place] if isinstance(section, list) and place < len(section) else None
        inner = section.get(name) if isinstance(section, dict) else inner
        if isinstance(inner, str) and name in _SHORT:
            inner = {_SHORT[name]: inner}
        elif inner is None:
            inner = {}
        if not isinstance(inner, (dict, list)):
            raise ConfigError(f"--set {short(override)}: {name} is {_shown(inner)} and has no settings of its own.")
        _put(section, place, inner)
        section = inner
    _put(section, _item(section, names[-1], override), value)


def _item(section: dict[Any, Any] | list[Any], name: str, override: str) -> Any:
    """`name` as the key of a mapping or the index of a list, at most one behind its end. Raises ConfigError."""
    if isinstance(section, dict):
        return name
    if not (name.isascii() and name.isdigit() and len(name) < 9 and int(name) <= len(section)):
        raise ConfigError(
            f"--set {short(override)}: {name!r} should be the index of an item of the list, from 0 to {len(section)}."
        )
    return int(name)


def _put(section: Any, place: Any, value: Any) -> None:
    if isinstance(section, list) and place == len(section):
        section.append(value)
    else:
        section[place] = value


def _sentence(error: ValidationError, section: type[BaseModel]) -> str:
    problems = [_problem(one, section) for one in error.errors(include_url=False)]
    more = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "") + "."


def _problem(error: Any, section: type[BaseModel]) -> str:
    path = ".".join(cut(visible(str(part)), 60) for part in error["loc"])
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"{path} is not a setting; {hint(section, error['loc'])}"
    if kind == "missing":
        return f"{path} is missing"
    if kind == "value_error":
        reason = str(error["ctx"]["error"]).rstrip(".")
        return f"{path}: {reason}" if path else reason
    if kind == "model_type":
        return f"{path} is {short(value, 60)}, but should be a mapping"
    if kind == "is_instance_of":  # the only such field is a trust region
        return f"{path} is {short(value, 60)}, but should be one of {', '.join(KINDS)}, or a mapping with such a kind"
    if kind == "string_type":
        return f"{path} is {short(value, 60)}, but should be text (in quotes where YAML reads it as something else)"
    reason = error["msg"].replace("Input should", "should")
    return f"{path} is {_shown(value)}, but {reason}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
