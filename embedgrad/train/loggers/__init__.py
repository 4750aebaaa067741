"""Optional listeners that write a run's figures for other programs: TensorBoard, Weights & Biases.

metrics.jsonl is always written and holds more; a logger only writes a copy for viewing. So a logger that fails during a
run is removed with a note, and the run continues.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedgrad.train.progress import Forwarding, Progress
from embedgrad.util.errors import ConfigError
from embedgrad.util.shown import first_line

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # package that each logger needs


def open_loggers(
    names: Sequence[str], folder: Path, description: Mapping[str, Any], note: Callable[[str], None]
) -> list[Progress]:
    """The loggers `names` ("tensorboard", "wandb") of the run in `folder`. They write nothing before the run starts.

    description: the run's configuration. note: called with a sentence when a logger fails. Raises ConfigError where a
    name is unknown or its package is not installed.
    """
    opened: list[Progress] = []
    for name in dict.fromkeys(names):
        if name not in _PACKAGES:
            raise ConfigError(f"{name!r} is no logger; known are {', '.join(_PACKAGES)}.")
        try:
            importlib.import_module(_PACKAGES[name])
        except ImportError as error:
            raise ConfigError(
                f"the logger {name} needs a package that cannot be imported ({error}): pip install 'embedgrad[{name}]'."
            ) from None
        if name == "tensorboard":
            from embedgrad.train.loggers.tensorboard import TensorBoard

            opened.append(Dispensable(TensorBoard(folder / "tensorboard"), name, note))
        else:
            from embedgrad.train.loggers.wandb import WeightsAndBiases

            opened.append(Dispensable(WeightsAndBiases(folder, description), name, note))
    return opened


class Dispensable(Forwarding):
    """Forwards calls to a listener until it raises an error. The error becomes a note, and the run continues."""

    def __init__(self, inner: Progress, name: str, note: Callable[[str], None]) -> None:
        self._inner: Progress | None = inner
        self._name, self._note = name, note

    def forward(self, method: str, *arguments: Any) -> None:
        """Calls the listener, unless it has failed before."""
        if self._inner is None:
            return
        try:
            getattr(self._inner, method)(*arguments)
        except Exception as error:  # the other package may raise any error
            self._inner = None
            self._note(
                f"The logger {self._name} failed and is left out from here on ({first_line(error)}); metrics.jsonl "
                "goes on."
            )
