"""One session of a run: from its start, or from the newest checkpoint, to its end or to a request to stop."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from embedgrad.data.example import Example
from embedgrad.distributed.ranks import ALONE, Ranks
from embedgrad.engine.batch_split import split_batch
from embedgrad.engine.model import Model
from embedgrad.engine.prompt_trainer import Batch, PromptTrainer, StepResult
from embedgrad.engine.scorer import Scorer
from embedgrad.engine.tree import prepare
from embedgrad.maths.optimizer import SGD, AdamW, Rule, learning_rate
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import Rendered, render
from embedgrad.train.agreement import SharedStop, check_alike, check_devices, check_same_start
from embedgrad.train.alarms import Alarms
from embedgrad.train.checkpoints import RunState, check_counts, identity, tensor_hash
from embedgrad.train.monitors import Answered, Judge, Monitors, Stopped, step_figures, weighted_share
from embedgrad.train.pipeline import Pipeline, Trainer
from embedgrad.train.progress import Progress
from embedgrad.train.ranked_trainer import RankedTrainer
from embedgrad.train.resuming import accept, computation, goes_on, tokens_hash
from embedgrad.train.run_folder import Found, RunFolder
from embedgrad.train.settings import OptimizeConfig
from embedgrad.util.errors import SaveError, TrainingError
from embedgrad.util.interrupts import StopRequest

# A resumed run may change these: they decide what is written and what is kept in memory, not what comes out.
FREE_TO_CHANGE = {"checkpoint_every", "memory_policy", "memory_budget", "save_last"}
_SIZED = 2000  # steps whose sizes are known before the first
_VALIDATION_CHUNK = 64  # examples between two looks at whether to stop


Prune = Callable[[Mapping[str, Any]], bool]
"""Whether a run ends with this record of a validation."""


class Session:
    """One session of one run. Between any two lines of `go`, `state` is consistent and can be saved."""

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
        ranks: Ranks = ALONE,
        prune: Prune | None = None,
    ) -> None:
        """ranks: the processes that take the run's steps together; the folder is with the first, None elsewhere."""
        self.ranks, self.prune = ranks, prune
        self.trainer_of: Callable[..., Trainer] = PromptTrainer
        self.model, self.prompt, self.train, self.validation = model, prompt, train, validation
        self.config, self.folder, self.progress = config, folder, progress
        self.stop = SharedStop(stop, ranks)
        self.total = config.total_steps(len(train))
        self.interval = config.validation_interval(len(train))
        self.anchor = prompt.anchor.to(prompt.embeddings.dtype)
        self.records: list[dict[str, Any]] = []
        self.judge = judge
        self.alarms = Alarms(config.monitors)
        rendered = _rendered(model, prompt, train, "training example")
        rendered_too = _rendered(model, prompt, validation, "validation example")
        self.rendering = tokens_hash([*rendered, *rendered_too])
        self.sequences, held_out = prepare(rendered), prepare(rendered_too)
        self.scored = split_batch(held_out, ranks.size)[ranks.rank]  # the validation examples that this rank scores
        own = [held_out[i] for i in self.scored]
        chunks = [own[i : i + _VALIDATION_CHUNK] for i in range(0, len(own), _VALIDATION_CHUNK)]
        self.scorer = Scorer(model, chunks, repeated=True)
        self.monitors = Monitors(
            model, train, validation, config.monitors, config.seed, judge, lambda: self.stop.asked, ranks
        )
        self.weights_hash = model.weights_hash()
        self.state = self._fresh()
        self._pipeline: Pipeline | None = None
        self.clock = self.settled = time.monotonic()

    def _fresh(self) -> RunState:
        start = self.config.trust_region.project(self.prompt.embeddings.detach().clone(), self.anchor)
        settings = self.config.model_dump(mode="json", exclude=FREE_TO_CHANGE) | self.judge.describe()
        told = {
            "text": self.prompt.text,
            "template": self.prompt.template.to_json(),
            "embeddings": tensor_hash(self.prompt.embeddings, self.prompt.anchor, torch.tensor(self.prompt.token_ids)),
        }
        weights = {"weights": self.weights_hash, "dtype": str(self.model.dtype)}
        return RunState(
            start, torch.zeros_like(start), torch.zeros_like(start), start.clone(),
            identity(
                settings, self.train, self.validation, told, weights, self.rendering,
                computation(self.model, self.ranks.size),
            ),
        )  # fmt: skip

    def begin(self, found: Found, description: Mapping[str, Any] | None, allow_other_bits: bool = False) -> None:
        """Go back to the checkpoint that was found, if there is one, and bring the folder in line with it."""
        if self.ranks.size > 1:
            check_devices(self.ranks, self.model.device)
            check_same_start(self.ranks, self.state.identity, self.config.model_dump(mode="json"))
        saved, notes = found.state, []
        if saved is not None:
            notes = self.ranks.only_first(lambda: self._accepted(saved, allow_other_bits)) or []
            if goes_on(saved, self.total):
                saved.identity, saved.stop_reason = self.state.identity, None
            self.state = saved
            self.records = found.records
            self.alarms = Alarms(self.config.monitors, self.records)
        self.progress.start(self.total, self.state.step)
        for note in notes:
            self.progress.note(note)
        for problem in found.problems:
            self.progress.note(f"{problem} Going on from step {self.state.step}.")
        if self.ranks.size > 1:
            self.pipeline  # noqa: B018 (its making connects the ranks, so all make it now)
        if self.folder is None:
            return
        default = {
            "model": self.model.name,
            "prompt": self.prompt.text,
            "optimize": self.config.model_dump(mode="json"),
        }
        self.folder.cut_back_to(self.state)
        self.folder.write_config(default if description is None else description)
        self._save_best()
        self._save()

    def _accepted(self, saved: RunState, allow_other_bits: bool) -> list[str]:
        assert self.folder is not None
        notes = accept(saved, self.state, self.total, self.folder.path, allow_other_bits)
        check_counts(saved, self.state, self.total)
        return notes

    def go(self) -> None:
        """Steps, validations and checkpoints until the run is over or asked to stop."""
        self.start()
        while self.goes_on():
            self.launch_step()
            self.end_step()
        self.finish()

    def start(self) -> None:
        """What comes before the first step."""
        self.clock = self.settled = time.monotonic()
        self._validate_if_due()

    def goes_on(self) -> bool:
        """Whether there is a step to take."""
        state = self.state
        if state.stop_reason is not None or self.stop.agree():
            return False
        if state.step >= self.total:
            state.stop_reason = "completed"
        return state.stop_reason is None

    def finish(self) -> None:
        """What comes after the last step."""
        state = self.state
        while self.pipeline.pending:  # where somebody asked to stop
            self._settle()
        self._fetch()
        if not self.validation:
            state.best, state.best_step = state.e.clone(), state.step
            self._save_best()
        self._check_alike()
        self._save()

    @property
    def pipeline(self) -> Pipeline:
        """The steps of this session, from the state as it is when they are first asked for."""
        if self._pipeline is None:  # a cached_property would lock out other threads while ranks meet
            self._pipeline = self._begin_steps()
        return self._pipeline

    def _begin_steps(self) -> Pipeline:
        state, config = self.state, self.config
        known = range(state.step, min(self.total, state.step + _SIZED))
        if self.ranks.size > 1:
            self.trainer_of = partial(RankedTrainer, ranks=self.ranks)
        trainer = self.trainer_of(
            self.model, (state.e, state.m, state.v), self.anchor, (self._batch(step) for step in known),
            region=config.trust_region, rule=rule_of(config), clip_norm=config.clip_norm, policy=config.memory_policy,
            memory_budget=config.memory_budget,
        )  # fmt: skip
        return Pipeline(trainer, self._batch, self._rate, self.total)

    def _batch(self, step: int) -> Batch:
        """Sequences and weights of step `step` (from 0)."""
        chosen = batch_indices(len(self.train), self.config.batch_size, step, self.config.seed)
        return [self.sequences[i] for i in chosen], [self.train[i].weight for i in chosen]

    def _rate(self, step: int) -> float:
        config = self.config
        return learning_rate(config.schedule, config.learning_rate, step, self.total, config.warmup_steps)

    def launch_step(self) -> None:
        """Launch one more step; where the trainer goes ahead, the next one too."""
        with self._saved_on_failure():
            self.pipeline.fill(self.state.step, self._pauses_after)

    def end_step(self) -> None:
        """Read the step that was launched, validate and save where that is due."""
        self._settle()
        if self.state.stop_reason is not None:  # an alarm: the step that was launched is one too many
            self.pipeline.take_back()
        self._validate_if_due()
        if self.state.step % self.config.checkpoint_every == 0:
            self._check_alike()
            self._save()

    def _pauses_after(self, step: int) -> bool:
        """Whether the state after `step` steps is needed before the next one may begin."""
        checked = bool(self.validation) and step % self.interval == 0
        return checked or step >= self.total or step % self.config.checkpoint_every == 0 or self.stop.requested

    def _settle(self) -> None:
        """Read the oldest step that was launched, and record it."""
        state, config = self.state, self.config
        with self._saved_on_failure():
            result = self.pipeline.read()
            self._check(result)
        state.step += 1
        now = time.monotonic()
        seconds, self.settled = now - self.settled, now
        tokens = sum(sequence.length for sequence in self._batch(state.step - 1)[0])
        record = {
            "kind": "step",
            "step": state.step,
            "epoch": (state.step - 1) // config.steps_per_epoch(len(self.train)) + 1,
            "loss": result.loss,
            "accuracy": float(result.exact.double().mean()),
            "gradient_norm": float(result.report.gradient_norm),
            "learning_rate": self._rate(state.step - 1),
            **step_figures(result.report),
            "tokens": tokens,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "seconds": seconds,
        }
        self._record(record)
        self.progress.step(record)
        self._look_at(record)

    def _fetch(self) -> None:
        """Bring e, m and v to what they are after `state.step` steps."""
        self.state.e, self.state.m, self.state.v = self.pipeline.state()

    def _check_alike(self) -> None:
        """Raises TrainingError where the ranks no longer hold the same bits."""
        if self.ranks.size > 1:
            self._fetch()
            check_alike(self.ranks, self.state)

    def _check(self, result: StepResult) -> None:
        """Raises TrainingError where the step was refused: the state is still that before it."""
        if bool(result.report.alive):
            return
        norm = float(result.report.gradient_norm)
        what = "the prompt or the optimiser's moments overflow"
        if not math.isfinite(result.loss):
            what = f"the loss is {result.loss}"
        elif not math.isfinite(norm):
            what = f"the gradient's norm is {norm}"
        raise TrainingError(f"{what} in step {self.state.step + 1}{self._advice()}")

    def _advice(self) -> str:
        kept = f"; the state after step {self.state.step} is in {self.folder.path}" if self.folder is not None else ""
        return f"{kept}. Try a lower learning_rate or clip_norm, or look at the examples of that batch."

    def _validate_if_due(self) -> None:
        state = self.state
        due = state.step % self.interval == 0 or state.step == self.total
        if not self.validation or not due or state.validated == state.step:
            return
        self._fetch()
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
        if self.prune is None or state.step >= self.total or state.stop_reason is not None:
            return
        if self.ranks.any(self.ranks.leads and self.prune(record)):
            state.stop_reason = "pruned"

    def _validate(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Accuracy and loss, weighted as the examples are, and what the monitors say. Raises Stopped."""
        prompt = self.prompt.replace(embeddings=self.state.e)
        losses, right = self._score(prompt)
        weights = [example.weight for example in self.validation]
        total = math.fsum(weights)
        loss, answered = 0.0, Answered([], [], []) if self.judge.generates else None
        for first in range(0, len(self.validation), _VALIDATION_CHUNK):
            chunk = slice(first, first + _VALIDATION_CHUNK)
            shares = torch.tensor([weight / total for weight in weights[chunk]], dtype=torch.float64)
            loss += float(torch.tensor(losses[chunk], dtype=torch.float64) @ shares)
        if answered is not None:
            for first in range(0, len(self.validation), _VALIDATION_CHUNK):
                chunk = slice(first, first + _VALIDATION_CHUNK)
                with self._saved_on_failure():
                    answered += self.monitors.answered(prompt, self.validation[chunk])
            right = [float(grade.correct) for grade in answered.grades]
        if not math.isfinite(loss):
            with self._saved_on_failure():
                raise TrainingError(f"the validation loss is {loss} after step {self.state.step}{self._advice()}")
        accuracy = weighted_share(right, weights)
        if self.stop.agree():
            raise Stopped
        with self._saved_on_failure():
            watched = self.monitors.validation_figures(prompt, accuracy, answered, self._recent())
        return {"accuracy": accuracy, "loss": loss}, watched

    def _score(self, prompt: SoftPrompt) -> tuple[list[float], list[float]]:
        """For each validation example its loss, and 1.0 where every target is the arg-max. Raises Stopped."""
        told: list[tuple[float, float]] = []
        for chunk in range(-(-len(self.scored) // _VALIDATION_CHUNK)):
            if self.stop.asked:
                break
            with self._saved_on_failure():
                details = self.scorer.details(prompt.embeddings, chunk)
            told += zip(details.example_loss.double().tolist(), details.exact.double().tolist(), strict=True)
        with self._saved_on_failure():
            if self.stop.agree():
                raise Stopped
            by_rank = self.ranks.gather([self.scored, told])
        pairs = {i: pair for members, scores in by_rank for i, pair in zip(members, scores, strict=True)}
        return [pairs[i][0] for i in sorted(pairs)], [pairs[i][1] for i in sorted(pairs)]

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
        self._fetch()
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


def rule_of(config: OptimizeConfig) -> Rule:
    """The optimiser that the settings ask for."""
    if config.optimizer == "adamw":
        return AdamW(config.betas, config.eps, config.weight_decay)
    return SGD(config.momentum, config.weight_decay)


def _rendered(model: Model, prompt: SoftPrompt, examples: Sequence[Example], what: str) -> list[Rendered]:
    """Each example's sequence; an example that cannot be used is refused here, not in the middle of a run."""
    return [render(model, prompt, example, example.where or f"{what} {i}") for i, example in enumerate(examples, 1)]
