"""embedgrad: tune a prompt's embeddings against a frozen language model (EmbedGrad, arXiv 2508.03533).

    import embedgrad

    model = embedgrad.load_model("path/to/model")
    prompt = embedgrad.SoftPrompt.from_text(model, "Classify the sentiment of the review.")
    batch = [embedgrad.Example(query="a great film", target="positive")]
    loss, grad = embedgrad.loss_and_grad(model, prompt, batch)

Names are imported when they are first used, so that `import embedgrad` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "embedgrad.errors": (
        "BackendError",
        "ConfigError",
        "ContextError",
        "DataError",
        "EmbedGradError",
        "ModelError",
        "PromptError",
        "SaveError",
        "TemplateError",
        "TrainingError",
    ),
    "embedgrad.evaluation": ("Evaluation", "evaluate"),
    "embedgrad.example": ("Example",),
    "embedgrad.generation": ("Generation", "generate"),
    "embedgrad.gradient": ("Details", "loss_and_grad", "score"),
    "embedgrad.model.model": ("Model", "load_model"),
    "embedgrad.prompt": ("SoftPrompt",),
    "embedgrad.rendering": ("Rendered", "render"),
    "embedgrad.sampling": ("Sampling",),
    "embedgrad.settings": ("OptimizeConfig",),
    "embedgrad.template": ("Template",),
    "embedgrad.train": ("OptimizeResult", "optimize"),
    "embedgrad.trust_region": ("CosineCone", "L2Ball", "MeanCosine", "NoRegion", "Penalty"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from embedgrad.errors import (
        BackendError,
        ConfigError,
        ContextError,
        DataError,
        EmbedGradError,
        ModelError,
        PromptError,
        SaveError,
        TemplateError,
        TrainingError,
    )
    from embedgrad.evaluation import Evaluation, evaluate
    from embedgrad.example import Example
    from embedgrad.generation import Generation, generate
    from embedgrad.gradient import Details, loss_and_grad, score
    from embedgrad.model.model import Model, load_model
    from embedgrad.prompt import SoftPrompt
    from embedgrad.rendering import Rendered, render
    from embedgrad.sampling import Sampling
    from embedgrad.settings import OptimizeConfig
    from embedgrad.template import Template
    from embedgrad.train import OptimizeResult, optimize
    from embedgrad.trust_region import CosineCone, L2Ball, MeanCosine, NoRegion, Penalty


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'embedgrad' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
