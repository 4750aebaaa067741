"""The searches by name, with their default settings."""

from __future__ import annotations

from collections.abc import Sequence

from embedgrad.data.example import Example
from embedgrad.distributed.ranks import ALONE, Ranks
from embedgrad.engine.model import Model
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.search.gcg import GreedyCoordinate
from embedgrad.search.objective import Objective
from embedgrad.search.pez import ProjectedEmbeddings
from embedgrad.search.search import Search
from embedgrad.train.session import batch_indices
from embedgrad.util.errors import ConfigError

KINDS = {"gcg": GreedyCoordinate, "pez": ProjectedEmbeddings}
FLUENT = "-fluent"
NAMES = tuple(kind + end for kind in KINDS for end in ("", FLUENT))
FLUENCY = 0.1  # weight of a nat per token of the text, beside the nats per target token of the task


def make_search(
    name: str, model: Model, prompt: SoftPrompt, examples: Sequence[Example], *, batch_size: int, seed: int,
    fluency: float = FLUENCY, ranks: Ranks = ALONE,
) -> Search:  # fmt: skip
    """The search `name`, one of NAMES, from `prompt`'s tokens. fluency: weight in the searches that have it. ranks:
    processes that share each step.

    Each step takes the batch that a training with the same seed and batch size takes. Raises ConfigError for another
    name, and what rendering the examples raises.
    """
    if name not in NAMES:
        raise ConfigError(f"there is no search {name!r}; choose one of {', '.join(NAMES)}.")
    kind = KINDS[name.removesuffix(FLUENT)]
    usable = [example for example in examples if example.weight > 0]
    objective = Objective(model, prompt, usable, fluency if name.endswith(FLUENT) else 0.0, ranks)
    size = min(batch_size, len(usable))
    return kind(objective, lambda step: batch_indices(len(usable), size, step, seed), seed)
