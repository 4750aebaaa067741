"""`optimize`: the whole optimisation of one prompt."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from embedgrad.data.example import Example, check_examples
from embedgrad.distributed.ranks import ALONE, Ranks
from embedgrad.engine.model import Model
from embedgrad.evaluation.targets import check_targets
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.train.checkpoints import decode, encode, tensor_hash
from embedgrad.train.monitors import Judge
from embedgrad.train.pipeline import Trainer
from embedgrad.train.progress import Progress, Quiet
from embedgrad.train.resuming import on_its_date
from embedgrad.train.run_folder import Found, Resume, RunFolder
from embedgrad.train.session import Prune, Session
from embedgrad.train.settings import OptimizeConfig
from embedgrad.util import environment
from embedgrad.util.errors import ConfigError, DataError, TrainingError
from embedgrad.util.interrupts import StopRequest, stop_on_signals


@dataclass(frozen=True)
class OptimizeResult:
    """What an optimisation came to.

    prompt: the best by validation (with the trust region and its figures in `metadata`); last_prompt: after the last
    step. history, validations, alarms: the records of metrics.jsonl. before, after: accuracy and loss on the validation
    data of the prompt as it started and of the best one; None without validation data. stop_reason: "completed",
    "early stopping", "alarm", "pruned", or, where a signal ended it and it can be resumed, "interrupted" (SIGINT),
    "terminated" (SIGTERM) or "hung up" (SIGHUP).
    train_seconds: time in steps, validations and checkpoints, over all sessions of the run. min_similarity: the lowest
    cosine of a row of `prompt` with its anchor.
    """

    prompt: SoftPrompt
    last_prompt: SoftPrompt
    history: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    before: dict[str, float] | None
    after: dict[str, float] | None
    best_step: int
    steps: int
    stop_reason: str
    train_seconds: float
    weights_unchanged: bool
    min_similarity: float


@dataclass(frozen=True)
class Run:
    """What `optimize` is given for one run, checked; the names are those of its arguments."""

    prompt: SoftPrompt
    train: list[Example]
    validation: list[Example]
    config: OptimizeConfig
    run_dir: str | os.PathLike[str] | None = None
    resume: Resume = False
    progress: Progress | None = None
    description: Mapping[str, Any] | None = None
    judge: Judge | None = None
    prune: Prune | None = None

    @classmethod
    def of(
        cls, prompt: SoftPrompt, train: Sequence[Example], validation: Sequence[Example], config: OptimizeConfig,
        **options: Any,
    ) -> Run:  # fmt: skip
        """The run with examples that count. Raises ConfigError, DataError."""
        check_examples(train, "the training data")
        check_examples(validation, "the validation data")
        train = [example for example in train if example.weight > 0]
        validation = [example for example in validation if example.weight > 0]
        _check(config, train, validation)
        return cls(prompt, train, validation, config, **options)


def optimize(
    model: Model,
    prompt: SoftPrompt,
    train: Sequence[Example],
    validation: Sequence[Example] | None,
    config: OptimizeConfig | None = None,
    *,
    run_dir: str | os.PathLike[str] | None = None,
    resume: Resume = False,
    progress: Progress | None = None,
    description: Mapping[str, Any] | None = None,
    terminate_cleanly: bool = False,
    judge: Judge | None = None,
    allow_other_bits: bool = False,
    ranks: Ranks = ALONE,
    prune: Prune | None = None,
) -> OptimizeResult:
    """Optimise `prompt` (which is not changed) on `train`; the best prompt is chosen on `validation`.

    Each epoch shuffles the examples by the seed and its number, and uses every one once; its last batch is shorter
    where batch_size does not divide them. The prompt is validated before the first step, so that "best" can be the
    prompt as it was, then at intervals and at the end. Without validation data the last prompt is the best. A prompt
    that starts outside the trust region is projected onto it first. Examples of weight 0 are left out.

    run_dir: folder for config, metrics, checkpoints, best prompt and summary; without it nothing is written. resume:
    True goes on with the run that is there, "auto" does so if there is one. A resumed run ends with the same bits as
    one that was never interrupted, unless it is given more steps. allow_other_bits: resume also where backend, device,
    threads or torch's version changed, which changes the bits. description: what config.yaml says, if more than the
    optimiser's settings. judge: how validations make and grade answers; default: exact answers, teacher-forced unless
    `accuracy_by` says otherwise.

    prune: called with the record of each validation; where it returns True, the run ends there ("pruned").

    ranks: the processes that do the run together (`embedgrad.distributed.join.join`); all call `optimize` with the same
    arguments and get the same result. Each computes its part of every batch, validation and answer. The first alone
    opens run_dir and informs `progress`. Their number is part of what decides about the bits.

    Ctrl-C ends the run after the step at hand, saves it and returns (a second one raises KeyboardInterrupt at once);
    with `terminate_cleanly` SIGTERM and SIGHUP do the same. Signals are left alone outside the main thread.

    Raises ConfigError (settings that do not fit, a folder with another run, a resumed run whose settings, data, prompt
    or model changed), DataError, PromptError, ContextError (before the first step), SaveError (disk full, folder not
    writable; what was saved before is intact), TrainingError (loss or gradient not finite: the state before that step
    is saved; weights changed).
    """
    config = OptimizeConfig() if config is None else config
    if not isinstance(config, OptimizeConfig):
        raise ConfigError(f"the settings must be an OptimizeConfig, not {type(config).__name__}.")
    if resume and run_dir is None:
        raise ConfigError("resume needs run_dir, the folder of the run to go on with.")
    given = Run.of(
        prompt, train, () if validation is None else validation, config, run_dir=run_dir, resume=resume,
        progress=progress, description=description, judge=judge, prune=prune,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals(terminate_cleanly, once=ranks.size == 1))
        session = begin_session(model, given, stack, stop, ranks, allow_other_bits)
        session.go()
        return result_of(session)


def begin_session(
    model: Model, run: Run, stack: contextlib.ExitStack, stop: StopRequest, ranks: Ranks, allow_other_bits: bool,
    trainer_of: Callable[..., Trainer] | None = None,
) -> Session:  # fmt: skip
    """The session of a run, ready for its first step. `stack` closes what it opens. trainer_of: makes what takes the
    steps; default: `PromptTrainer`. Raises what `optimize` raises."""
    folder = None
    if run.run_dir is not None:
        space = 4 * run.prompt.embeddings.numel() * run.prompt.embeddings.element_size()
        again = run.resume or ("auto" if ranks.restarted else False)
        path = run.run_dir
        folder = ranks.only_first(lambda: stack.enter_context(_opened(path, again, space)))
    progress = run.progress if run.progress is not None and ranks.leads else Quiet()
    stack.callback(progress.stop)
    judge = _judge(run.judge or Judge(), run.config)
    for part, what in ((run.train, "training example"), (run.validation, "validation example")):
        check_targets(part, what, grader=judge.grader)
    found = _found(folder, ranks)
    prompt, note = on_its_date(run.prompt, model, found.state)
    if note is not None:
        progress.note(note)
    session = Session(
        model, prompt, run.train, run.validation, run.config, folder, progress, stop, judge, ranks, run.prune
    )
    if trainer_of is not None:
        session.trainer_of = trainer_of
    session.begin(found, run.description, allow_other_bits)
    return session


def _opened(path: str | os.PathLike[str], resume: Resume, checkpoint_bytes: int) -> RunFolder:
    """The run folder, with room for checkpoints."""
    folder = RunFolder.open(path, resume)
    try:
        folder.probe(checkpoint_bytes)
    except BaseException:
        folder.close()
        raise
    return folder


def _found(folder: RunFolder | None, ranks: Ranks) -> Found:
    """What the folder of rank 0 holds of an earlier session, on every rank."""
    found = ranks.only_first(lambda: Found(None, [], []) if folder is None else folder.find())
    if ranks.size == 1 and found is not None:
        return found
    saved = ranks.share(None if found is None or found.state is None else encode(found.state))
    told = ranks.share(None if found is None else json.dumps([found.records, found.problems]).encode())
    assert told is not None
    return Found(None if saved is None else decode(saved), *json.loads(told))


def _judge(judge: Judge, config: OptimizeConfig) -> Judge:
    """The judge that the settings ask for."""
    if config.accuracy_by == "auto":
        return judge
    return replace(judge, generated=config.accuracy_by == "generated")


def _check(config: OptimizeConfig, train: Sequence[Example], validation: Sequence[Example]) -> None:
    if not train:
        raise DataError("there are no training examples (of weight above 0).")
    if config.patience is not None and not validation:
        raise ConfigError("patience counts validations, but there is no validation data: leave it out or give some.")
    total = config.total_steps(len(train))
    if config.warmup_steps > total:
        raise ConfigError(f"warmup_steps is {config.warmup_steps}, but the run has only {total} steps.")


def result_of(session: Session) -> OptimizeResult:
    """The result. Checks that the weights are unchanged, and writes last.safetensors and the summary."""
    state = session.state
    if session.model.weights_hash() != session.weights_hash:
        raise TrainingError("the model's weights changed during the optimisation; its result cannot be trusted.")
    best = session.prompt_at(state.best, state.best_step, state.after)
    result = OptimizeResult(
        prompt=best,
        last_prompt=session.prompt_at(state.e, state.step, None),
        history=[record for record in session.records if record["kind"] == "step"],
        validations=[record for record in session.records if record["kind"] == "validation"],
        alarms=[record for record in session.records if record["kind"] == "alarm"],
        before=state.before,
        after=state.after,
        best_step=state.best_step,
        steps=state.step,
        stop_reason=state.stop_reason or session.stop.reason or "interrupted",
        train_seconds=state.seconds,
        weights_unchanged=True,
        min_similarity=float(best.similarity().min()),
    )
    if session.folder is not None:
        if session.config.save_last:
            result.last_prompt.save(session.folder.path / "last.safetensors")
        session.folder.write_summary(_summary(session, result))
    return result


def _summary(session: Session, result: OptimizeResult) -> dict[str, Any]:
    return {
        "model": session.model.name,
        "stop_reason": result.stop_reason,
        "steps": result.steps,
        "best_step": result.best_step,
        "validation": {"before": result.before, "after": result.after},
        "alarms": result.alarms,
        "min_similarity": result.min_similarity,
        "prompt_tokens": len(session.prompt.token_ids),
        "token_texts": session.model.tokenizer.texts(session.prompt.token_ids),
        "train_examples": len(session.train),
        "validation_examples": len(session.validation),
        "embeddings_sha256": tensor_hash(result.prompt.embeddings),
        "weights_unchanged": result.weights_unchanged,
        "train_seconds": result.train_seconds,
        "computing": {
            "backend": session.model.backend,
            "device": str(session.model.device),
            "dtype": str(session.model.dtype).removeprefix("torch."),
        },
        "versions": environment.versions(),
        "machine": environment.machine(),
    }
