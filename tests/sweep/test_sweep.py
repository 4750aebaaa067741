"""A sweep on a tiny model: its space, its trials, a worker that dies, the winner's test, the page."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from embedgrad.cli.commands import sweep as command
from embedgrad.engine.model import load_model
from embedgrad.sweep import study as studies
from embedgrad.sweep import worker as workers
from embedgrad.sweep.space import check_space, overrides_of
from embedgrad.sweep.worker import Sweep
from embedgrad.train.optimize import Run
from embedgrad.train.plan import plan
from embedgrad.train.settings import load_run_config
from embedgrad.util.errors import ConfigError
from tests.model.tiny import write_folder

CONFIG = """
model: {path: tiny, dtype: float32, device: cpu}
prompt: Say what it is.
data: {path: data.jsonl, labels: [positive, negative], split: {train: 9, validation: 5, test: 4}}
optimize: {batch_size: 4, validate_every: 2, checkpoint_every: 2, steps: 4, select_by: loss}
sweep:
  trials: 4
  parameters:
    optimize.learning_rate: {low: 1.0e-5, high: 5.0e-2, log: true}
    optimize.trust_region: [{kind: cosine, tau: 0.9}, none]
    prompt.text: [Say what it is., "What is it, please?"]
    optimize.seed: {low: 0, high: 2}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_folder(folder / "tiny")
    rows = [{"query": f"A film of {i}", "target": ("positive", "negative")[i % 2]} for i in range(18)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(CONFIG)
    return folder


def run(home: Path, folder: str, *sets: str, together: int = 1) -> dict[str, Any]:
    given = [f"run.folder={home / folder}", *sets]
    assert command.run(home / "run.yaml", given, None, True, together) == 0
    found: dict[str, Any] = json.loads((home / folder / "run-sweep" / "sweep.json").read_text())
    return found


@pytest.mark.parametrize("together", [1, 3])
def test_trials_are_runs_and_the_best_is_tested_once(home: Path, together: int) -> None:
    found = run(home, f"runs{together}", together=together)
    folder = home / f"runs{together}" / "run-sweep"
    assert len(found["trials"]) == 4
    complete = [trial for trial in found["trials"] if trial["state"] == "complete"]
    assert found["winner"] == min(complete, key=lambda trial: trial["value"])["name"]
    tested = [path.parent.name for path in folder.glob("*/test.json")]
    assert tested == [found["winner"]]
    for trial in complete:
        settings = load_run_config(folder / trial["name"] / "config.yaml")
        assert settings.optimize.learning_rate == pytest.approx(trial["values"]["optimize.learning_rate"], rel=1e-12)
        assert settings.prompt is not None
        assert settings.prompt.text == trial["values"]["prompt.text"]
    page = (folder / "report.html").read_text()
    assert all(trial["name"] in page for trial in found["trials"])
    before = (folder / found["winner"] / "test.json").stat().st_mtime_ns
    assert run(home, f"runs{together}", together=together)["trials"] == found["trials"]  # nothing is left to do
    assert (folder / found["winner"] / "test.json").stat().st_mtime_ns == before
    assert len(run(home, f"runs{together}", "sweep.trials=5")["trials"]) == 5


def worker(home: Path, folder: str, *sets: str) -> Sweep:
    """A worker of the sweep in home/folder."""
    given = [f"run.folder={home / folder}", *sets]
    planned = plan(load_run_config(home / "run.yaml", given))
    model = load_model(home / "tiny", device="cpu")
    return Sweep(planned, model, home / folder / "run-sweep", home / "run.yaml", given, lambda _: None)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without a sign of life are dead after a second."""
    monkeypatch.setattr(studies, "BEAT", 1)
    monkeypatch.setattr(studies, "GRACE", 1)
    monkeypatch.setattr(workers, "GRACE", 1)
    monkeypatch.setattr(workers, "_PAUSE", 0.2)


@pytest.mark.parametrize("died", ["asking", "beginning", "running"])
def test_the_trial_of_a_dead_worker_is_gone_on_with(home: Path, impatient: None, died: str) -> None:
    dying = worker(home, f"dead-{died}")
    trial = dying.study.ask()
    if died != "asking":
        begun = dying._begun(trial)
        assert begun.run_dir == home / f"dead-{died}" / "run-sweep" / "trial-0000"
    if died == "running":
        dying.study._storage.record_heartbeat(trial._trial_id)
        time.sleep(3)
    found = run(home, f"dead-{died}")
    assert len(found["trials"]) == 4
    assert all(each["state"] in ("complete", "pruned") for each in found["trials"])
    if died != "asking":
        again = next(each for each in found["trials"] if each["name"] == "trial-0000")
        assert again["values"] == trial.params


def test_a_worker_that_was_suspended_loses_its_trial_and_goes_on(
    home: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker has taken it for dead while it was in the middle of a trial, which is gone on with."""
    suspended, other = worker(home, "suspended"), worker(home, "suspended")
    monkeypatch.setattr(workers, "beating", lambda study, trials: contextlib.nullcontext())
    begun = Sweep._begun
    taken = []

    def begin(self: Sweep, trial: Any) -> Run:
        made = begun(self, trial)
        if not taken:
            taken.append(trial)
            self.study._storage.record_heartbeat(trial._trial_id)
            time.sleep(3)
            studies.fail_stale(other.study, {trial._trial_id})
        return made

    monkeypatch.setattr(Sweep, "_begun", begin)
    suspended.work()
    found = suspended.trials()
    assert sorted(trial.name for trial in found) == [f"trial-{number:04d}" for number in (0, 2, 3, 4)]
    assert all(trial.state in ("complete", "pruned") for trial in found)
    assert next(trial for trial in found if trial.name == "trial-0000").values == taken[0].params


def test_a_storage_that_is_lost_while_a_trial_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = worker(home, "lost")
    begun = Sweep._begun

    def begin(self: Sweep, trial: Any) -> Run:
        made = begun(self, trial)
        (home / "lost" / "run-sweep" / "study.db").write_bytes(b"nothing" * 10_000)
        return made

    monkeypatch.setattr(Sweep, "_begun", begin)
    with pytest.raises(ConfigError, match="can no longer be used"):
        lost.work()


def test_a_grid_is_gone_through_once(home: Path) -> None:
    sets = ["sweep.sampler=grid", "sweep.trials=50", "sweep.pruner=none"]
    sets.append("sweep.parameters={optimize.seed: {low: 0, high: 1}, optimize.batch_size: [2, 3]}")
    found = run(home, "grid", *sets)
    tried = {tuple(sorted(trial["values"].items())) for trial in found["trials"]}
    assert len(found["trials"]) == len(tried) == 4


def test_other_settings_are_refused(home: Path) -> None:
    run(home, "same", "sweep.trials=1")
    with pytest.raises(ConfigError, match="another model"):
        run(home, "same", "sweep.trials=1", "optimize.batch_size=3")


def test_a_trial_that_fails_leaves_the_others(home: Path) -> None:
    sets = ["sweep.pruner=none", "sweep.sampler=grid", "sweep.parameters={optimize.warmup_steps: [0, 4, 5]}"]
    found = run(home, "failing", *sets)
    failed = [trial for trial in found["trials"] if trial["state"] == "failed"]
    assert len(failed) == 1
    assert "warmup_steps is 5" in failed[0]["problem"]


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ("{optimize.learnin_rate: [1.0e-3]}", "learning_rate"),
        ("{optimize.learning_rate: [1.0e-3, -1]}", "cannot be -1"),
        ("{data.seed: [1, 2]}", "cannot be varied"),
        ("{optimize.steps: {low: 5, high: 3}}", "should be below high"),
        ("{optimize.steps: {low: 0, high: 3}}", "cannot be 0"),
        ("{optimize.learning_rate: {low: 0, high: 1, log: true}}", "above 0"),
        ("{optimize.steps: []}", "list of values"),
        ("{}", "at least 1"),
    ],
)
def test_spaces_that_cannot_be(home: Path, parameters: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run(home, "never", f"sweep.parameters={parameters}")


def test_a_database_that_cannot_be_used(home: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        run(home, "never", "sweep.storage=nonsense://x")


def test_small_numbers_survive_yaml(home: Path) -> None:
    for value in (1e-5, 3.3e-7, 0.1, 1.0, 12, "1e-5", None, True, {"kind": "none"}):
        assert overrides_of({"a.b": value})[0].startswith("a.b=")
    config = load_run_config(home / "run.yaml", overrides_of({"optimize.learning_rate": 3.3e-7}))
    assert config.optimize.learning_rate == 3.3e-7
    assert config.sweep is not None
    check_space(home / "run.yaml", (), config.sweep)
