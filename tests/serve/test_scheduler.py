"""The scheduler's thread: turns, failures, and a close in the midst."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

import embedgrad
from embedgrad.generation.generate import write_sequences
from embedgrad.generation.writer import Generation
from embedgrad.serve import scheduler as module
from embedgrad.serve.scheduler import Full, Job, Scheduler
from embedgrad.serve.served import ServedModel
from embedgrad.util.errors import EmbedGradError
from tests.exports.shared import tiny_folder, tuned


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ServedModel]:
    folder: Path = tiny_folder(tmp_path_factory.mktemp("scheduler") / "model")
    model = embedgrad.load_model(folder)
    return [ServedModel(model, "tuned", tuned(folder)), ServedModel(model, "bare", None)]


class Asked:
    """Jobs and what became of them."""

    def __init__(self) -> None:
        self.results: list[Generation | EmbedGradError] = []
        self.done = threading.Event()
        self.jobs: list[Job] = []

    def job(self, served: ServedModel, query: str, **sampling: Any) -> Job:
        def end(result: Generation | EmbedGradError) -> None:
            self.results.append(result)
            if len(self.results) == len(self.jobs):
                self.done.set()

        rendered = served.chat([{"role": "user", "content": query}])
        job = Job(served, rendered, embedgrad.Sampling(**sampling), None, 0, end)
        self.jobs.append(job)
        return job


def scheduler(models: list[ServedModel], **options: Any) -> Scheduler:
    found = Scheduler(
        models[0].model, deliver=lambda calls: [call() for call in calls],
        **{"slots": 4, "capacity": 2000, "max_waiting": 16, **options},
    )  # fmt: skip
    for served in models:
        found.know(served)
    return found


def test_a_long_answer_does_not_keep_another_model_waiting(
    models: list[ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TURN", 0.0)  # a step each, on a machine of any speed
    found, long, short = scheduler(models), Asked(), Asked()
    # Without stop tokens the long answer runs to the end of the model's context.
    endless = {token: float("-inf") for token in models[1].limits.stop_ids}
    found.submit([long.job(models[1], "a", max_new_tokens=2000, logit_bias=endless, seed=i) for i in range(4)])
    found.submit([short.job(models[0], "b", max_new_tokens=4)])
    found.start()
    assert short.done.wait(60)
    finished_first = not long.done.is_set()
    found.cancel(long.jobs)
    until = time.monotonic() + 60
    while found.running and time.monotonic() < until:
        time.sleep(0.01)
    assert found.running == found.waiting == 0
    found.close()
    assert finished_first
    right = write_sequences(
        models[0].model, models[0].embeddings, models[0].end, [short.jobs[0].rendered],
        embedgrad.Sampling(max_new_tokens=4),
    )  # fmt: skip
    assert short.results == right


def test_a_failure_reaches_its_jobs_and_the_thread_goes_on(
    models: list[ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, failing, later = scheduler(models), Asked(), Asked()
    found.start()

    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(module, "Writer", broken)
        found.submit([failing.job(models[0], "a"), failing.job(models[0], "b")])
        assert failing.done.wait(60)
    assert all(isinstance(result, EmbedGradError) and "no room" in str(result) for result in failing.results)
    found.submit([later.job(models[0], "a", max_new_tokens=2)])
    assert later.done.wait(60)
    assert isinstance(later.results[0], Generation)
    assert found.alive
    found.close()
    assert not found.alive


def test_jobs_beyond_the_bound_are_refused_together(models: list[ServedModel]) -> None:
    found, asked = scheduler(models, max_waiting=3), Asked()
    found.submit([asked.job(models[0], "a") for _ in range(2)])
    with pytest.raises(Full, match="2 answers wait"):
        found.submit([asked.job(models[0], "b") for _ in range(2)])
    assert found.waiting == 2
    found.cancel(asked.jobs)
    found.start()
    found.close()
