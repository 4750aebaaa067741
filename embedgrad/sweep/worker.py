"""One worker of a sweep: takes trials until there are enough, each an ordinary run in a folder of its own."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedgrad.engine.model import Model
from embedgrad.sweep.space import grid, suggest, trial_config
from embedgrad.sweep.study import (
    FOLDER,
    GRACE,
    LOSS,
    PROBLEM,
    TakenOver,
    beating,
    end_trial,
    fail_stale,
    open_study,
    quiet,
    still_ours,
    storage_needed,
    take_over,
)
from embedgrad.train.optimize import OptimizeResult, Run
from embedgrad.train.paths import seen_from
from embedgrad.train.plan import Plan, plan
from embedgrad.train.run_folder import read_metrics
from embedgrad.train.settings import RunConfig, SweepSection
from embedgrad.train.together import optimize_together
from embedgrad.util.errors import EmbedGradError
from embedgrad.util.folder_lock import FolderInUse
from embedgrad.util.interrupts import REASONS, Stopped
from embedgrad.util.shown import short

_PAUSE = 2.0  # seconds between two looks at what the other workers do
_SURPLUS = "not needed: the others were enough"


@dataclass(frozen=True)
class Trial:
    """A trial as it stands. state: "complete", "pruned", "running", "waiting" or "failed". value: accuracy or loss of
    its best validation. loss: that validation's loss. values: of the parameters. problem: why it failed."""

    number: int
    state: str
    name: str
    values: dict[str, Any]
    value: float | None
    loss: float | None
    problem: str | None


class Sweep:
    """A sweep in `folder`. Raises ConfigError where the folder belongs to other settings or another model."""

    def __init__(
        self, planned: Plan, model: Model, folder: Path, path: Path, overrides: Sequence[str],
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """path, overrides: the configuration of which `planned` is made. say: takes a line for people."""
        section = planned.config.sweep
        assert section is not None
        self.section: SweepSection = section
        self.model, self.folder, self.path, self.overrides, self._say = model, folder, path, overrides, say
        self.by_loss = planned.config.optimize.select_by == "loss"
        self.study = open_study(section, folder, self._identity(planned), maximise=not self.by_loss)

    def _identity(self, planned: Plan) -> dict[str, Any]:
        """What all trials have in common."""
        config = planned.config.model_dump(mode="json", exclude={"run", "compare"})
        for free in ("trials", "storage", "pruner", "unpruned", "sampler", "seed"):
            config["sweep"].pop(free)
        config["model"].pop("path")
        return {"config": config, "prompt": planned.prompt, "weights": self.model.weights_hash()}

    def work(self, together: int = 1) -> None:
        """Take trials until there are enough and all have ended. together: how many take their steps in one pass.

        Raises Stopped, SaveError, ConfigError (the storage can no longer be used).
        """
        with storage_needed(self.section, self.folder):
            self._work(together)

    def _work(self, together: int) -> None:
        known: set[int] = set()
        while True:
            fail_stale(self.study, known)
            states = [trial.state for trial in self.trials() if trial.problem != _SURPLUS]
            ended = sum(state in ("complete", "pruned", "failed") for state in states)
            wanted = self.section.trials
            if self.section.sampler == "grid":
                wanted = min(wanted, math.prod(map(len, grid(self.section).values())))
            if ended >= wanted:
                return
            free = max(wanted - ended - states.count("running"), states.count("waiting"))
            if free:
                self._turn(min(free, together))
            else:
                time.sleep(_PAUSE)

    def _turn(self, count: int) -> None:
        """Ask for `count` trials, run them, and tell what came of them."""
        with quiet():
            trials = [self.study.ask() for _ in range(count)]
        with beating(self.study, trials):
            self._run_all(trials)

    def _run_all(self, trials: Sequence[Any]) -> None:
        runs: list[tuple[Any, Run]] = []
        for trial in trials:
            try:
                runs.append((trial, self._begun(trial)))
            except EmbedGradError as error:
                self._failed(trial, error)
        try:
            results = optimize_together(
                self.model, [run for _, run in runs], terminate_cleanly=True, allow_other_bits=True
            )
        except BaseException:
            for trial, _ in runs:
                self._leave(trial)
            raise
        reason = None
        for (trial, run), result in zip(runs, results, strict=True):
            if isinstance(result, FolderInUse):  # the worker that was taken for dead is still at it
                self._leave(trial)
                time.sleep(GRACE)
            elif isinstance(result, EmbedGradError):
                self._failed(trial, result)
            elif result.stop_reason in REASONS:
                self._leave(trial)
                reason = result.stop_reason
            else:
                self._ended(trial, run, result)
        if reason is not None:
            raise Stopped(reason)

    def _leave(self, trial: Any) -> None:
        """Leave a trial to whoever asks next."""
        with contextlib.suppress(TakenOver):
            take_over(self.study, end_trial(self.study, trial, state="FAIL"))

    def _failed(self, trial: Any, error: EmbedGradError) -> None:
        if isinstance(error, TakenOver):
            return
        with contextlib.suppress(TakenOver):
            with still_ours():
                trial.set_user_attr(PROBLEM, str(error))
            end_trial(self.study, trial, state="FAIL")
            if str(error) != _SURPLUS:
                self._say(f"{trial.user_attrs.get(FOLDER)}: {error}")

    def _ended(self, trial: Any, run: Run, result: OptimizeResult) -> None:
        assert result.after is not None
        told = ", ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in trial.params.items())
        pruned = result.stop_reason == "pruned"
        value = float(result.after["loss" if self.by_loss else "accuracy"])
        with contextlib.suppress(TakenOver):
            with still_ours():
                trial.set_user_attr(LOSS, result.after["loss"])
            end_trial(self.study, trial, **({"state": "PRUNED"} if pruned else {"value": value}))
            self._say(
                f"{trial.user_attrs[FOLDER]}: {result.stop_reason} after {result.steps} steps, {told}: best validation "
                f"accuracy {result.after['accuracy']:.4f}, loss {result.after['loss']:.4f}"
            )

    def trials(self) -> list[Trial]:
        """All trials but those that were left to another worker."""
        found = []
        for each in self.study.get_trials(deepcopy=False):
            state, attributes = each.state.name.lower(), each.user_attrs
            state = {"fail": "failed"}.get(state, state)
            if state == "failed" and PROBLEM not in attributes:
                continue
            name = attributes.get(FOLDER) or f"trial-{each.number:04d}"
            values = dict(each.params)
            value = each.value if state == "complete" else None
            found.append(Trial(each.number, state, name, values, value, attributes.get(LOSS), attributes.get(PROBLEM)))
        return found

    def ranked(self) -> list[Trial]:
        """The completed trials, the best first: by the validation's accuracy, then its loss; or by its loss."""
        complete = [trial for trial in self.trials() if trial.state == "complete" and trial.value is not None]
        sign = 1 if self.by_loss else -1
        return sorted(complete, key=lambda trial: (sign * (trial.value or 0), trial.loss or 0, trial.number))

    def config(self, values: Mapping[str, Any], name: str) -> RunConfig:
        """The configuration of a trial."""
        return trial_config(self.path, self.overrides, values, name, str(self.folder))

    def _begun(self, trial: Any) -> Run:
        """The run of a trial. Raises EmbedGradError."""
        earlier = [one for one in self.trials() if one.number < trial.number and one.problem is None]
        if trial.user_attrs.get(FOLDER) is None and len(earlier) >= self.section.trials:
            raise EmbedGradError(_SURPLUS)
        name = trial.user_attrs.get(FOLDER) or f"trial-{trial.number:04d}"
        with still_ours():
            trial.set_user_attr(FOLDER, name)
        config = self.config(suggest(trial, self.section), name)
        planned = plan(config)
        parts = planned.parts(self.model.tokenizer)
        place = self.folder / name
        description = config.model_dump(mode="json")
        seen_from(place, description)

        def prune(record: Mapping[str, Any]) -> bool:
            with quiet(), still_ours():  # a resumed run reports its last validation again
                trial.report(record["loss" if self.by_loss else "accuracy"], record["step"])
            return bool(trial.should_prune())

        for record in read_metrics(place)[0]:  # of a worker that died
            if record["kind"] == "validation":
                prune(record)
        return Run.of(
            planned.start(self.model), parts.train, parts.validation, planned.config.optimize, run_dir=place,
            resume="auto", description=description, judge=planned.judge, prune=prune,
        )  # fmt: skip


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else short(value, 40)
