"""One session of a run: from its start, or from the newest checkpoint, to its end or to a request to stop."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from embedgrad.alarms import Alarms
from embedgrad.errors import ConfigError, SaveError, TrainingError
from embedgrad.example import Example
from embedgrad.gradient import loss_and_grad, score
from embedgrad.interrupts import StopRequest
from embedgrad.model.model import Model
from embedgrad.monitors import Answered, Judge, Monitors, Stopped, step_figures, weighted_share
from embedgrad.optimizer import StepReport, clip_by_norm, learning_rate, sgd_step, zeros_like_prompt
from embedgrad.progress import Progress
from embedgrad.prompt import SoftPrompt
from embedgrad.rendering import render
from embedgrad.run_state import RunState, differences, identity, tensor_hash
from embedgrad.runs import RunFolder
from embedgrad.settings import OptimizeConfig

# A resumed run may change these: they decide what is written and what is kept in memory, not what comes out.
FREE_TO_CHANGE = {"checkpoint_every", "memory_policy", "memory_budget", "save_last"}
_VALIDATION_CHUNK = 64  # examples between two looks at whether to stop


class Session:
    """One session of one run. `state` is whole between any two lines of `go`, so it can be saved there."""

    def __init__(
        self,
        model: Model,
        prompt: SoftPrompt,
        train: list[Example],
        validation: list[Example],
        config: OptimizeConfig,
        folder: RunFolder | None,
        progress: Progress,
        stop: StopRequest,
        judge: Judge,
    ) -> None:
        self.model, self.prompt, self.train, self.validation = model, prompt, train, validation
        self.config, self.folder, self.progress, self.stop = config, folder, progress, stop
        self.total = config.total_steps(len(train))
        self.interval = config.validation_interval(len(train))
        self.anchor = prompt.anchor.to(prompt.embeddings.dtype)
        self.records: list[dict[str, Any]] = []
        self.judge = judge
        self.alarms = Alarms(config.monitors)
        self.tokens = _lengths(model, prompt, train, "training example")
        _lengths(model, prompt, validation, "validation example")
        self.monitors = Monitors(
            model, train, validation, config.monitors, config.seed, judge, lambda: self.stop.requested
        )
        self.weights_hash = model.weights_hash()
        self.state = self._fresh()
        self.clock = time.monotonic()

    def _fresh(self) -> RunState:
        start = self.config.trust_region.project(self.prompt.embeddings.detach().clone(), self.anchor)
        m, v = zeros_like_prompt(start)
        settings = self.config.model_dump(mode="json", exclude=FREE_TO_CHANGE) | self.judge.describe()
        told = {
            "text": self.prompt.text,
            "template": self.prompt.template.to_json(),
            "embeddings": tensor_hash(self.prompt.embeddings, self.prompt.anchor, torch.tensor(self.prompt.token_ids)),
        }
        weights = {"weights": self.weights_hash, "dtype": str(self.model.dtype)}
        return RunState(
            start, m, v, start.clone(), identity(settings, self.train, self.validation, told, weights)
        )  # fmt: skip

    def begin(self, description: Mapping[str, Any] | None) -> None:
        """Go back to the newest checkpoint, if there is one, and bring the folder in line with it."""
        if self.folder is None:
            self.progress.start(self.total, 0)
            return
        saved, problems = self.folder.load_state()
        if saved is not None:
            changed = differences(saved.identity, self.state.identity)
            if changed:
                raise ConfigError(
                    f"the run in {self.folder.path} cannot be resumed, because this changed: {', '.join(changed)}."
                )
            self.state = saved
            self.records = self.folder.records(saved.lines)
            self.alarms = Alarms(self.config.monitors, self.records)
        self.progress.start(self.total, self.state.step)
        for problem in problems:
            self.progress.note(f"{problem} Going on from step {self.state.step}.")
        default = {
            "model": self.model.name,
            "prompt": self.prompt.text,
            "optimize": self.config.model_dump(mode="json"),
        }
        self.folder.cut_back_to(self.state)
        self.folder.write_config(default if description is None else description)
        self._save_best()
        self._save()

    def go(self) -> None:
        """Steps, validations and checkpoints until the run is over or asked to stop."""
        self.clock = time.monotonic()
        state = self.state
        self._validate_if_due()
        while state.stop_reason is None and not self.stop.requested:
            if state.step >= self.total:
                state.stop_reason = "completed"
                break
            self._step()
            self._validate_if_due()
            if state.step % self.config.checkpoint_every == 0:
                self._save()
        if not self.validation:
            state.best, state.best_step = state.e.clone(), state.step
            self._save_best()
        self._save()

    def _step(self) -> None:
        state, config = self.state, self.config
        started = time.monotonic()
        rate = learning_rate(config.schedule, config.learning_rate, state.step, self.total, config.warmup_steps)
        chosen = batch_indices(len(self.train), config.batch_size, state.step, config.seed)
        with self._saved_on_failure():
            loss, gradient, details = loss_and_grad(
                self.model, self.prompt.replace(embeddings=state.e), [self.train[i] for i in chosen],
                policy=config.memory_policy, memory_budget=config.memory_budget, details=True,
            )  # fmt: skip
            gradient = gradient.to(state.e.dtype)
            pull = config.trust_region.penalty_gradient(state.e, self.anchor)
            if pull is not None:
                gradient += pull
            norm = clip_by_norm(gradient, config.clip_norm)
            if not math.isfinite(loss) or not math.isfinite(norm):
                what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
                raise TrainingError(f"{what} in step {state.step + 1}{self._advice()}")
            report = self._move(gradient, rate)
        state.step += 1
        seconds = time.monotonic() - started
        tokens = sum(self.tokens[i] for i in chosen)
        record = {
            "kind": "step",
            "step": state.step,
            "epoch": (state.step - 1) // config.steps_per_epoch(len(self.train)) + 1,
            "loss": loss,
            "accuracy": float(details.exact.double().mean()),
            "gradient_norm": norm,
            "learning_rate": rate,
            **step_figures(report),
            "tokens": tokens,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "seconds": seconds,
        }
        self._record(record)
        self.progress.step(record)
        self._look_at(record)

    def _move(self, gradient: torch.Tensor, rate: float) -> StepReport:
        """Take the step, or none of it: a prompt that is not finite afterwards is put back."""
        state, config = self.state, self.config
        before = [tensor.clone() for tensor in (state.e, state.m, state.v)]
        if config.optimizer == "adamw":
            e, e0, m, v, g = (x.to(self.model.device) for x in (state.e, self.anchor, state.m, state.v, gradient))
            report = self.model.ops.prompt_step(
                e, e0, m, v, g, step=state.step + 1, lr=rate,
                region=config.trust_region, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
            )  # fmt: skip
            state.e, state.m, state.v = (x.cpu() for x in (e, m, v))
        else:
            report = sgd_step(
                state.e, self.anchor, state.m, gradient, lr=rate,
                region=config.trust_region, momentum=config.momentum, weight_decay=config.weight_decay,
            )  # fmt: skip
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (state.e, state.m, state.v)):
            for tensor, old in zip((state.e, state.m, state.v), before, strict=True):
                tensor.copy_(old)
            raise TrainingError(
                f"the prompt or the optimiser's moments overflow in step {state.step + 1}{self._advice()}"
            )
        return report

    def _advice(self) -> str:
        kept = f"; the state after step {self.state.step} is in {self.folder.path}" if self.folder is not None else ""
        return f"{kept}. Try a lower learning_rate or clip_norm, or look at the examples of that batch."

    def _validate_if_due(self) -> None:
        state = self.state
        due = state.step % self.interval == 0 or state.step == self.total
        if not self.validation or not due or state.validated == state.step:
            return
        try:
            measured, watched = self._validate()
        except Stopped:
            return
        state.validated = state.step
        state.before = state.before or measured
        better = state.after is None or _rank(measured, self.config) > _rank(state.after, self.config)
        if better:
            state.best, state.best_step, state.after, state.stale = state.e.clone(), state.step, measured, 0
        else:
            state.stale += 1
        record = {"kind": "validation", "step": state.step, **measured, "best": better, **watched}
        self._record(record)
        if better:
            self._save_best()
        self.progress.validation(record)
        self._look_at(record)
        if self.config.patience is not None and state.stale >= self.config.patience and state.step < self.total:
            state.stop_reason = "early stopping"

    def _validate(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Accuracy and loss, weighted as the examples are, and what the monitors say. Raises Stopped."""
        prompt = self.prompt.replace(embeddings=self.state.e)
        answered = Answered([], [], []) if self.judge.generates else None
        loss, right = 0.0, []
        weights = [example.weight for example in self.validation]
        total = math.fsum(weights)
        for first in range(0, len(self.validation), _VALIDATION_CHUNK):
            if self.stop.requested:
                raise Stopped
            chunk = self.validation[first : first + _VALIDATION_CHUNK]
            with self._saved_on_failure():
                details = score(self.model, prompt, chunk)
                if answered is not None:
                    answered += self.monitors.answered(prompt, chunk)
            shares = torch.tensor([example.weight / total for example in chunk], dtype=torch.float64)
            loss += float(details.example_loss.double().cpu() @ shares)
            right += details.exact.double().tolist()
        if answered is not None:
            right = [float(grade.correct) for grade in answered.grades]
        if not math.isfinite(loss):
            with self._saved_on_failure():
                raise TrainingError(f"the validation loss is {loss} after step {self.state.step}{self._advice()}")
        accuracy = weighted_share(right, weights)
        if self.stop.requested:
            raise Stopped
        with self._saved_on_failure():
            watched = self.monitors.validation_figures(prompt, accuracy, answered, self._recent())
        return {"accuracy": accuracy, "loss": loss}, watched

    def _recent(self) -> tuple[float, int] | None:
        """Accuracy of the last steps' examples, each as it was just before its step, and their number."""
        wanted = min(self.config.monitors.train_examples, len(self.train))
        right, seen = 0.0, 0
        for record in reversed(self.records):
            if seen >= wanted:
                break
            if record["kind"] == "step":
                size = len(batch_indices(len(self.train), self.config.batch_size, record["step"] - 1, self.config.seed))
                right, seen = right + record["accuracy"] * size, seen + size
        return (right / seen, seen) if seen else None

    def _look_at(self, record: Mapping[str, Any]) -> None:
        """Sound the alarms that a record sets off; one whose action is "stop" ends the run."""
        for alarm in self.alarms.check(record):
            told = alarm.to_record()
            self._record(told)
            self.progress.alarm(told, alarm.sentence())
            if alarm.action == "stop" and self.state.step < self.total:
                self.state.stop_reason = "alarm"

    def _record(self, record: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.append(record)
        self.records.append(record)
        self.state.lines += 1

    def _save(self) -> None:
        now = time.monotonic()
        self.state.seconds += now - self.clock
        self.clock = now
        if self.folder is None:
            return
        try:
            self.folder.save_state(self.state)
        except SaveError as error:
            raise SaveError(f"{error} The run can be resumed from its last checkpoint.") from error

    def _save_best(self) -> None:
        if self.folder is not None:
            best = self.prompt_at(self.state.best, self.state.best_step, self.state.after)
            best.save(self.folder.path / "prompt.safetensors")

    @contextlib.contextmanager
    def _saved_on_failure(self) -> Iterator[None]:
        """Whatever goes wrong inside, the state as it was before is on the disk when the error leaves."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, Stopped):
                self._save()
            raise

    def prompt_at(self, embeddings: torch.Tensor, step: int, measured: Mapping[str, float] | None) -> SoftPrompt:
        """A prompt to save: these embeddings, and where they come from in the metadata."""
        metrics: dict[str, Any] = {"step": step}
        if measured is not None:
            metrics |= {f"validation_{name}": value for name, value in measured.items()}
        metadata = {**self.prompt.metadata, "trust_region": self.config.trust_region.describe(), "metrics": metrics}
        return self.prompt.replace(embeddings=embeddings.clone(), metadata=metadata)


def batch_indices(examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which examples step `step` (from 0) uses: a function of its arguments, so that resuming needs no random state."""
    per_epoch = -(-examples // batch_size)
    epoch, position = divmod(step, per_epoch)
    order = list(range(examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[position * batch_size : (position + 1) * batch_size]


def _rank(measured: Mapping[str, float], config: OptimizeConfig) -> tuple[float, ...]:
    """Larger is better."""
    by_loss = (-measured["loss"],)
    return by_loss if config.select_by == "loss" else (measured["accuracy"], *by_loss)


def _lengths(model: Model, prompt: SoftPrompt, examples: Sequence[Example], what: str) -> list[int]:
    """Tokens of each example's sequence; an example that cannot be used is refused here, not in the middle of a run."""
    return [len(render(model, prompt, example, where=f"{what} {i}").ids) for i, example in enumerate(examples, 1)]
