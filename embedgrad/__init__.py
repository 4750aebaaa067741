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
    "embedgrad.util.errors": (
        "BackendError",
        "ConfigError",
        "ContextError",
        "DataError",
        "EmbedGradError",
        "ExportError",
        "ModelError",
        "PromptError",
        "SaveError",
        "TemplateError",
        "TrainingError",
    ),
    "embedgrad.evaluation.evaluate": ("Evaluation", "evaluate"),
    "embedgrad.exports.export": ("ExportReport", "export"),
    "embedgrad.exports.import_peft": ("import_prompt",),
    "embedgrad.data.example": ("Example",),
    "embedgrad.generation.generate": ("Generation", "generate"),
    "embedgrad.engine.gradient": ("Details", "loss_and_grad"),
    "embedgrad.engine.scorer": ("score",),
    "embedgrad.engine.model": ("Model", "load_model"),
    "embedgrad.prompt.prompt": ("SoftPrompt",),
    "embedgrad.prompt.rendering": ("Rendered", "render"),
    "embedgrad.generation.sampling": ("Sampling",),
    "embedgrad.train.settings": ("OptimizeConfig",),
    "embedgrad.prompt.template": ("Template",),
    "embedgrad.train.optimize": ("OptimizeResult", "optimize"),
    "embedgrad.maths.trust_region": ("CosineCone", "L2Ball", "MeanCosine", "NoRegion", "Penalty"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from embedgrad.data.example import Example
    from embedgrad.engine.gradient import Details, loss_and_grad
    from embedgrad.engine.model import Model, load_model
    from embedgrad.engine.scorer import score
    from embedgrad.evaluation.evaluate import Evaluation, evaluate
    from embedgrad.exports.export import ExportReport, export
    from embedgrad.exports.import_peft import import_prompt
    from embedgrad.generation.generate import Generation, generate
    from embedgrad.generation.sampling import Sampling
    from embedgrad.maths.trust_region import CosineCone, L2Ball, MeanCosine, NoRegion, Penalty
    from embedgrad.prompt.prompt import SoftPrompt
    from embedgrad.prompt.rendering import Rendered, render
    from embedgrad.prompt.template import Template
    from embedgrad.train.optimize import OptimizeResult, optimize
    from embedgrad.train.settings import OptimizeConfig
    from embedgrad.util.errors import (
        BackendError,
        ConfigError,
        ContextError,
        DataError,
        EmbedGradError,
        ExportError,
        ModelError,
        PromptError,
        SaveError,
        TemplateError,
        TrainingError,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'embedgrad' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
