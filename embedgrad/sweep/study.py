"""Opens the study of a sweep: its storage, sampler and pruner, all Optuna's."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedgrad.sweep.space import grid
from embedgrad.train.settings import SweepSection
from embedgrad.util.errors import ConfigError, EmbedGradError
from embedgrad.util.shown import first_line

BEAT, GRACE = 5, 30  # seconds between two signs of life of a worker, and until one without is taken for dead
FOLDER, IDENTITY, PROBLEM, LOSS, WORKERS = "folder", "identity", "problem", "loss", "workers"


class TakenOver(EmbedGradError):
    """Another worker took this one for dead, as after a suspension, and goes on with its trial."""


def open_study(section: SweepSection, folder: Path, identity: Mapping[str, Any], maximise: bool) -> Any:
    """The study in its storage, made by the first worker. Raises ConfigError (no Optuna, a database that cannot be
    used, a study of other settings)."""
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = _url(section, folder)
    options: dict[str, Any] = {"heartbeat_interval": BEAT, "grace_period": GRACE}
    known = inspect.signature(optuna.storages.RDBStorage.__init__).parameters
    name = "heartbeat_stale_trial_callback" if "heartbeat_stale_trial_callback" in known else "failed_trial_callback"
    options[name] = take_over
    if url.startswith("sqlite"):
        options["engine_kwargs"] = {"connect_args": {"timeout": 60}}
    own = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    with alone(folder), quiet():  # two workers that make the tables at once would disturb each other
        try:
            storage = optuna.storages.RDBStorage(url, **options)
            study = optuna.create_study(
                storage=storage, study_name=folder.name, load_if_exists=True,
                direction="maximize" if maximise else "minimize", pruner=_pruner(optuna, section),
            )  # fmt: skip
        except Exception as error:  # SQLAlchemy's and the drivers' errors have no common base
            raise ConfigError(f"the sweep's storage {url} cannot be used: {first_line(error)}") from error
        known_as = study.user_attrs.get(IDENTITY)
        if known_as is None:
            study.set_user_attr(IDENTITY, own)
        elif known_as != own:
            raise ConfigError(
                f"{folder} holds a sweep of other settings, parameters, data or another model; give another run.name, "
                "or remove it."
            )
        worker = study.user_attrs.get(WORKERS, 0)
        study.set_user_attr(WORKERS, worker + 1)
    study.sampler = _sampler(optuna, section, worker)
    study.stop = lambda: None  # a grid that is done stops Optuna's own loop, which a worker does not use
    return study


def take_over(study: Any, trial: Any) -> None:
    """Let another worker go on with the trial of a worker that died, in the same run folder."""
    study.enqueue_trial(trial.params, user_attrs={FOLDER: trial.user_attrs.get(FOLDER)})


def fail_stale(study: Any, known: set[int]) -> None:
    """Take over the trials of workers that died. known: the running trials that this worker has seen, which grows.

    Optuna takes no trial for dead that never gave a sign of life, as where a worker died right after it had asked. So
    each gets one when it is first seen.
    """
    with quiet():
        for trial in study.get_trials(deepcopy=False, states=[trial_state("RUNNING")]):
            if trial._trial_id not in known:
                known.add(trial._trial_id)
                study._storage.record_heartbeat(trial._trial_id)
        _optuna().storages.fail_stale_trials(study)


def trial_state(name: str) -> Any:
    """Optuna's state of this name, such as FAIL."""
    return _optuna().trial.TrialState[name]


def end_trial(study: Any, trial: Any, *, value: float | None = None, state: str | None = None) -> Any:
    """Tell Optuna that a trial has ended, with a value or in a state. Raises TakenOver."""
    with still_ours():
        if study._storage.get_trial(trial._trial_id).state.is_finished():
            raise TakenOver
        return study.tell(trial, value, None if state is None else trial_state(state))


@contextlib.contextmanager
def still_ours() -> Iterator[None]:
    """Inside the block, what is told about a trial that another worker has ended raises TakenOver."""
    try:
        yield
    except _optuna().exceptions.UpdateFinishedTrialError as error:
        raise TakenOver from error


@contextlib.contextmanager
def storage_needed(section: SweepSection, folder: Path) -> Iterator[None]:
    """Inside the block, a storage that can no longer be used becomes one sentence (ConfigError)."""
    try:
        yield
    except _optuna().exceptions.StorageInternalError as error:
        raise ConfigError(
            f"the sweep's storage {_url(section, folder)} can no longer be used: "
            f"{first_line(error.__cause__ or error)}; the trials' runs are saved, and the same command goes on."
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block Optuna does not say that its signs of life are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def beating(study: Any, trials: Sequence[Any]) -> Iterator[None]:
    """Inside the block the trials give signs of life, as those of Optuna's own loop do."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            beat_once()

    def beat_once() -> None:
        for trial in trials:
            with contextlib.suppress(Exception):  # a database that is busy; the next beat comes in time
                study._storage.record_heartbeat(trial._trial_id)

    beat_once()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _url(section: SweepSection, folder: Path) -> str:
    return section.storage or f"sqlite:///{(folder / 'study.db').absolute()}"


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("a sweep needs Optuna; pip install 'embedgrad[sweep]' brings it.") from error
    return optuna


def _sampler(optuna: Any, section: SweepSection, worker: int) -> Any:
    """The sampler of one worker; two with one seed would try the same values."""
    seed = (section.seed + 7919 * worker) % (1 << 32)
    if section.sampler == "grid":
        return optuna.samplers.GridSampler(grid(section), seed=seed)
    if section.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=section.unpruned, constant_liar=True)


def _pruner(optuna: Any, section: SweepSection) -> Any:
    if section.pruner == "none":
        return optuna.pruners.NopPruner()
    if section.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=section.unpruned, n_warmup_steps=1)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside the block no other worker on this machine is inside one."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as lock:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
