"""What several commands need: the model, the data of a configuration, and figures as text."""

from __future__ import annotations

from pathlib import Path

from embedgrad.data import read_jsonl, split
from embedgrad.errors import ConfigError
from embedgrad.evaluation import Accuracy
from embedgrad.example import Example
from embedgrad.model.model import Model, load_model
from embedgrad.settings import DataSection, FileSection, PromptSection, expand_path

MEASURES = {"generated_accuracy": "exact answer", "choice_accuracy": "likeliest label"}


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


def examples(section: DataSection) -> dict[str, list[Example]]:
    """train, validation and test of a configuration; empty lists where it has none. Raises DataError."""
    if section.path is not None and section.split is not None:
        sizes = {name: getattr(section.split, name) for name in ("train", "validation", "test")}
        every = read_jsonl(expand_path(section.path), section.query, section.target)
        return split(every, sizes, section.split.seed)

    def read(file: FileSection | None) -> list[Example]:
        return [] if file is None else read_jsonl(expand_path(file.path), section.query, section.target, file.limit)

    return {"train": read(section.train), "validation": read(section.validation), "test": read(section.test)}


def write_text(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all. Raises SaveError."""
    from embedgrad.files import write_atomic

    write_atomic(path, text.encode())


def with_interval(accuracy: Accuracy | None) -> str:
    """A share with its 95 % interval: "0.895 (0.860 to 0.922)"; "-" where it was not measured."""
    return "-" if accuracy is None else f"{accuracy.value:.3f} ({accuracy.low:.3f} to {accuracy.high:.3f})"
