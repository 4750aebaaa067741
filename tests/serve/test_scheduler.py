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


def test_requests_that_come_together_share_a_prefill(
    models: list[ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle group waits for a request that is being read, and for the clients whose answers ended together."""
    entered: list[int] = []
    enter = module.Writer.enter

    def counted(writer: module.Writer, requests: Any) -> None:
        entered.append(len(requests))
        enter(writer, requests)

    monkeypatch.setattr(module.Writer, "enter", counted)
    monkeypatch.setattr(module, "GATHER", 60.0)
    monkeypatch.setattr(module, "RETURN", 60.0)
    found, first, second = scheduler(models), Asked(), Asked()
    one, other, again, last = (asked.job(models[0], "a", max_new_tokens=1) for asked in (first, first, second, second))
    found.start()
    with found.expecting():
        found.submit([one])
        time.sleep(0.05)
        assert not entered
        found.submit([other])
    assert first.done.wait(60)
    found.submit([again])
    time.sleep(0.05)
    found.submit([last])
    assert second.done.wait(60)
    found.close()
    assert entered == [2, 2]


def test_another_thread_uses_the_model_between_two_steps(models: list[ServedModel]) -> None:
    """While answers are written without a pause. Neither side's results change, nor does one wait for whole answers."""
    served, example = models[0], embedgrad.Example("a joy", "yes")
    prompt = served.prompt
    assert prompt is not None
    endless = {token: float("-inf") for token in served.limits.stop_ids}
    sampling = {"max_new_tokens": 400, "logit_bias": endless, "temperature": 1.0}

    def used() -> tuple[float, list[float], list[int]]:
        loss, gradient = embedgrad.loss_and_grad(served.model, prompt, [example])
        (answer,) = embedgrad.generate(served.model, prompt, ["b"], embedgrad.Sampling(max_new_tokens=4))
        return loss, gradient.flatten().tolist(), answer.ids

    def written(between: bool) -> tuple[list[list[int]], list[Any], int]:
        found, asked = scheduler(models, max_waiting=64), Asked()
        jobs = [asked.job(served, "a", **sampling, seed=i) for i in range(16)]
        found.submit(jobs)
        found.start()
        others = [used() for _ in range(6)] if between else []
        early = len(asked.results)
        assert asked.done.wait(120)
        found.close()
        answers = [result for result in asked.results if isinstance(result, Generation)]
        return sorted(answer.ids for answer in answers), others, early

    alone = used()
    right, _, _ = written(between=False)
    answers, others, early = written(between=True)
    assert len(right) == 16
    assert answers == right
    assert others == [alone] * 6
    assert early < 16
