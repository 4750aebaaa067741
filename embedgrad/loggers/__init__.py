"""Optional listeners of a run that write its figures for other programs: TensorBoard, Weights & Biases.

metrics.jsonl is always written and says more; what is written here is a copy for looking at. So a logger that fails in
the middle of a run is dropped with a note, and the run goes on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedgrad.errors import ConfigError
from embedgrad.progress import Progress

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # name of a logger -> package that it needs


def open_loggers(
    names: Sequence[str], folder: Path, description: Mapping[str, Any], note: Callable[[str], None]
) -> list[Progress]:
    """The loggers `names` ("tensorboard", "wandb") of the run in `folder`; nothing is written before the run starts.

    description: the run's configuration. note: is told of a logger that fails. Raises ConfigError where a name is
    unknown or its package is not installed.
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
            from embedgrad.loggers.tensorboard import TensorBoard

            opened.append(Dispensable(TensorBoard(folder / "tensorboard"), name, note))
        else:
            from embedgrad.loggers.wandb import WeightsAndBiases

            opened.append(Dispensable(WeightsAndBiases(folder, description), name, note))
    return opened


class Dispensable:
    """A listener whose first failure is told in a note and is its last word; the run does not depend on it."""

    def __init__(self, inner: Progress, name: str, note: Callable[[str], None]) -> None:
        self._inner: Progress | None = inner
        self._name, self._note = name, note

    def start(self, total: int, done: int) -> None:
        """Passes it on."""
        self._pass("start", total, done)

    def step(self, record: Mapping[str, Any]) -> None:
        """Passes it on."""
        self._pass("step", record)

    def validation(self, record: Mapping[str, Any]) -> None:
        """Passes it on."""
        self._pass("validation", record)

    def alarm(self, record: Mapping[str, Any], sentence: str) -> None:
        """Passes it on."""
        self._pass("alarm", record, sentence)

    def note(self, text: str) -> None:
        """Passes it on."""
        self._pass("note", text)

    def stop(self) -> None:
        """Passes it on."""
        self._pass("stop")

    def _pass(self, method: str, *arguments: Any) -> None:
        if self._inner is None:
            return
        try:
            getattr(self._inner, method)(*arguments)
        except Exception as error:  # whatever another project's code raises
            self._inner = None
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            self._note(
                f"The logger {self._name} failed and is left out from here on ({reason}); metrics.jsonl goes on."
            )


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of a step's or validation's record by the name a logger gives them ("train/loss",
    "validation/answers/tokens"); no lists, no texts, nothing that is not there."""
    place = {"step": "train"}.get(record["kind"], record["kind"])
    return dict(_flat(place, {key: value for key, value in record.items() if key not in ("kind", "step")}))


def _flat(place: str, values: Mapping[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(f"{place}/{key}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((f"{place}/{key}", float(value)))
    return found
