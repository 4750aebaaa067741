"""What the tests of the training loop share: a tiny model, its data, and outputs in a form that can be compared."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from embedgrad.data.example import Example
from embedgrad.engine.model import Model, load_model
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.train.settings import OptimizeConfig
from tests.model.tiny import write_folder

TRAIN = [
    Example(f"A film of {word}, number {i}", "positive" if i % 2 else "negative", 1.0 + i % 3)
    for i, word in enumerate(["joy", "pain"] * 5 + ["plot"])
]
VALIDATION = TRAIN[:4]
TIMES = {"seconds", "tokens_per_second", "train_seconds"}


@functools.cache
def model_folder() -> Path:
    """A tiny Llama on disk, for as long as the test session lives."""
    keeper = tempfile.TemporaryDirectory(prefix="embedgrad-tiny-")
    model_folder.keeper = keeper  # type: ignore[attr-defined]
    write_folder(Path(keeper.name) / "tiny")
    return Path(keeper.name) / "tiny"


@functools.cache
def tiny_model() -> Model:
    """The model of `model_folder`, computing in float32."""
    return load_model(model_folder(), device="cpu")


def start_prompt(model: Model) -> SoftPrompt:
    """A prompt of a few tokens."""
    return SoftPrompt.from_text(model, "Say what it is.")


def quick_config(**changes: Any) -> OptimizeConfig:
    """Seven steps of four examples with validations and checkpoints in between."""
    settings: dict[str, Any] = {"steps": 7, "batch_size": 4, "learning_rate": 2e-2, "trust_region": {"tau": 0.8}}
    settings |= {"validate_every": 3, "checkpoint_every": 2, "select_by": "loss", "schedule": "cosine"}
    return OptimizeConfig(**settings | changes)


def outcome(folder: Path) -> dict[str, Any]:
    """Everything in the folder of a finished run, without the times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "prompt": (folder / "prompt.safetensors").read_bytes(),
        "last": (folder / "last.safetensors").read_bytes(),
        "metrics": [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines],
        "summary": {k: v for k, v in summary.items() if k not in TIMES},
        "files": sorted(path.name for path in folder.rglob("*") if path.suffix != ".tmp"),
    }
