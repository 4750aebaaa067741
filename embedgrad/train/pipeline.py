"""The order in which steps are prepared, launched and read, so that a GPU does not wait for the host.

While the device works on step n, step n + 1 is prepared on the host and launched, and only then step n is read. Where
the state after a step is needed (a validation, a checkpoint), the next step is launched after that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from embedgrad.engine.prompt_trainer import Batch, StepResult


class Trainer(Protocol):
    """Takes steps; see `PromptTrainer`. Only the trainer itself looks into what `prepare` and `launch` return."""

    @property
    def ahead(self) -> int:
        """Steps that may be launched before the first of them is read: 0 or 1."""

    def prepare(self, batch: Batch) -> Any:
        """All of a step that the host can do early."""

    def launch(self, prepared: Any, step: int, lr: float) -> Any:
        """Start a step; `step` counts from 1."""

    def read(self, launched: Any) -> StepResult:
        """Wait for a step."""

    def take_back(self) -> None:
        """Undo the last step that was launched; once."""

    def state(self, before_last: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """e, m and v on the CPU."""


class Pipeline:
    """Steps of one trainer. Steps are counted from 0."""

    def __init__(
        self, trainer: Trainer, batch: Callable[[int], Batch], rate: Callable[[int], float], total: int
    ) -> None:
        """batch(n), rate(n): the examples and the learning rate of step n. total: steps of the run."""
        self._trainer, self._batch, self._rate, self._total = trainer, batch, rate, total
        self._launched: list[Any] = []  # not read yet
        self._ready: Any = None  # the step after them

    @property
    def pending(self) -> int:
        """Steps that are launched and not read."""
        return len(self._launched)

    def fill(self, step: int, pauses_after: Callable[[int], bool]) -> None:
        """Launch step `step`, if it is not launched yet, and as many after it as the trainer may go ahead.

        pauses_after(n): whether the state after n steps is needed before the next one may begin.
        """
        while self.pending <= self._trainer.ahead:
            if self._launched and pauses_after(step + self.pending):
                break
            self._launch(step + self.pending)

    def read(self) -> StepResult:
        """Wait for the oldest step that is launched."""
        return self._trainer.read(self._launched.pop(0))

    def take_back(self) -> None:
        """Undo the step that was launched and not read, if there is one."""
        if self._launched:
            self._trainer.take_back()
            self._launched.clear()

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """e, m and v after all steps that were read, copied to the CPU."""
        return self._trainer.state(before_last=bool(self._launched))

    def _launch(self, step: int) -> None:
        ready = self._trainer.prepare(self._batch(step)) if self._ready is None else self._ready
        self._launched.append(self._trainer.launch(ready, step + 1, self._rate(step)))
        more = self._trainer.ahead and step + 1 < self._total
        self._ready = self._trainer.prepare(self._batch(step + 1)) if more else None
