"""transformers and PEFT on the weights of one of our models, where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.harness.contenders import Build, others
from embedgrad.compare.twin import twin_sharing
from embedgrad.engine.model import Model

NEEDS = {"transformers": ("transformers",), "peft": ("peft", "transformers")}
"""The packages of each contender."""


class Twins:
    """The twin of a model, made when it is first asked for."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._twin: Any = None

    def twin(self) -> Any:
        """A transformers model."""
        if self._twin is None:
            self._twin = twin_sharing(self._model, "sdpa")
        return self._twin

    def build(self, name: str) -> tuple[Build, str]:
        """What makes the step of a case by PEFT or transformers, and its version."""
        return others(name, self._model, self._model.device, self.twin())

    def generate(self, ids: torch.Tensor, tokens: int) -> Callable[[], Any]:
        """`transformers.generate`, `tokens` new tokens for each row of ids [B, n], whatever they are."""
        twin, mask = self.twin(), torch.ones_like(ids)
        return lambda: twin.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
