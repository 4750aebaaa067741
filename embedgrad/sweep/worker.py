"""One worker of a sweep: takes trials until there are enough, each an ordinary run in a folder of its own."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedgrad.engine.model import Model
from embedgrad.sweep.space import suggest, trial_config
from embedgrad.sweep.study import FOLDER, LOSS, PROBLEM, fail_stale, open_study, take_over
from embedgrad.train.optimize import OptimizeResult, optimize
from embedgrad.train.paths import seen_from
from embedgrad.train.plan import Plan, plan
from embedgrad.train.run_folder import FolderInUse, read_metrics
from embedgrad.train.settings import RunConfig, SweepSection
from embedgrad.util.errors import EmbedGradError, SaveError
from embedgrad.util.interrupts import REASONS

_PAUSE = 2.0  # seconds between two looks at what the other workers do
_SURPLUS = "not needed: the others were enough"


class Stopped(Exception):
    """A signal stopped the worker; its trial is left to the others. reason: one of REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


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

    def work(self) -> None:
        """Take trials until there are enough and all have ended. Raises Stopped, SaveError."""
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna calls its heartbeat experimental
                fail_stale(self.study)
                states = [trial.state for trial in self.trials() if trial.problem != _SURPLUS]
                ended = sum(state in ("complete", "pruned", "failed") for state in states)
                if ended >= self.section.trials:
                    return
                if ended + states.count("running") < self.section.trials or "waiting" in states:
                    before = len(states)
                    self.study.optimize(self._objective, n_trials=1, catch=(EmbedGradError,))
                    if len(self.study.trials) == before:  # a grid of which nothing is left
                        return
                    continue
            time.sleep(_PAUSE)

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

    def _objective(self, trial: Any) -> float:
        import optuna

        earlier = [one for one in self.trials() if one.number < trial.number and one.problem is None]
        if trial.user_attrs.get(FOLDER) is None and len(earlier) >= self.section.trials:
            trial.set_user_attr(PROBLEM, _SURPLUS)
            raise EmbedGradError(_SURPLUS)
        values = suggest(trial, self.section)
        name = trial.user_attrs.get(FOLDER) or f"trial-{trial.number:04d}"
        trial.set_user_attr(FOLDER, name)
        try:
            result = self._run(trial, self.config(values, name))
        except SaveError:
            take_over(self.study, trial)
            raise
        except EmbedGradError as error:
            trial.set_user_attr(PROBLEM, str(error))
            self._say(f"{name}: {error}")
            raise
        if result.stop_reason in REASONS:
            take_over(self.study, trial)
            raise Stopped(result.stop_reason)
        assert result.after is not None
        trial.set_user_attr(LOSS, result.after["loss"])
        told = ", ".join(f"{key.rpartition('.')[2]} {value!r}" for key, value in trial.params.items())
        self._say(f"{name}: {result.stop_reason} after {result.steps} steps, {told}: best validation accuracy "
                  f"{result.after['accuracy']:.4f}, loss {result.after['loss']:.4f}")  # fmt: skip
        if result.stop_reason == "pruned":
            raise optuna.TrialPruned
        return float(result.after["loss" if self.by_loss else "accuracy"])

    def _run(self, trial: Any, config: RunConfig) -> OptimizeResult:
        planned = plan(config)
        parts = planned.parts(self.model.tokenizer)
        place = self.folder / str(config.run.name)
        description = config.model_dump(mode="json")
        seen_from(place, description)

        def prune(record: Mapping[str, Any]) -> bool:
            trial.report(record["loss" if self.by_loss else "accuracy"], record["step"])
            return bool(trial.should_prune())

        for record in read_metrics(place)[0]:  # of a worker that died
            if record["kind"] == "validation":
                prune(record)
        while True:
            try:
                return optimize(
                    self.model, planned.start(self.model), parts.train, parts.validation, config.optimize,
                    run_dir=place, resume="auto", description=description, terminate_cleanly=True, judge=planned.judge,
                    allow_other_bits=True, prune=prune,
                )  # fmt: skip
            except FolderInUse:  # the worker that was taken for dead is still at it
                time.sleep(_PAUSE)
