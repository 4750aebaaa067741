"""The thread that writes answers. Requests of a served model join its running loop; served models take turns.

A served model has a *group* of slots for conversations that begin with its usual prefix, whose keys and values are
kept, and one for all others. A group's loop runs until somebody waits for one of its slots, another group has work, or
another thread waits for the model.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from embedgrad.engine.model import Model
from embedgrad.generation.generate import REFILL, Generation
from embedgrad.generation.loops import loop_for
from embedgrad.generation.prefill import prefill_prefix
from embedgrad.generation.sampling import Sampling
from embedgrad.generation.writer import Request, Writer
from embedgrad.prompt.rendering import Rendered
from embedgrad.serve.served import ServedModel
from embedgrad.util.errors import ConfigError, EmbedGradError

TURN = 0.1  # seconds of a group while another one waits; a switch costs one call into csrc/
PATIENCE = 8  # steps that a newcomer waits at most for others to enter with; a prefill of one is a small matrix product
BUSY = 8  # a newcomer waits a step for company for so many answers, which its prefill holds up
GATHER = 0.05  # seconds that an idle group waits at most for requests that are being read
RETURN = 0.005  # seconds after a step in which clients ask again; answers of one length end together
PREFILL = 2048  # tokens of newcomers that are computed together; running answers wait meanwhile


class Full(EmbedGradError):
    """As many answers wait as may."""


@dataclass(eq=False)
class Job:
    """An answer that is wanted.

    on_token: on_token(id, log-probability, top) is called for each token; top: (ids, log-probabilities) of the `top`
    likeliest tokens. on_end: called once, with the answer or an error. Both are called in the scheduler's thread,
    together for all tokens of a step, through `Scheduler`'s `deliver`.
    """

    served: ServedModel
    rendered: Rendered
    sampling: Sampling
    choice: Any
    stream: int
    on_end: Callable[[Generation | EmbedGradError], object]
    on_token: Callable[[int, float, tuple[list[int], list[float]] | None], object] | None = None
    top: int = 0
    cached: int = 0
    cancelled: bool = False
    request: Request | None = None


@dataclass
class _Group:
    """Slots whose answers begin alike. usual: they begin with the model's usual prefix."""

    served: ServedModel
    usual: bool
    waiting: deque[Job] = field(default_factory=deque)
    running: set[Job] = field(default_factory=set)
    writer: Writer | None = None
    since: int = 0  # steps since a job began to wait
    ended: int = 0  # answers that ended together at the time `ended_at`
    ended_at: float = 0.0


class Scheduler:
    """Takes jobs from any thread.

    slots: answers of a group that are written at the same time. capacity: tokens of the longest answer. max_waiting:
    jobs that may wait. deliver: deliver(calls) gets the callbacks of a step, as functions without arguments.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int,
        capacity: int,
        max_waiting: int,
        deliver: Callable[[Sequence[Callable[[], object]]], object],
    ) -> None:
        self._model, self._slots, self._capacity, self._max_waiting = model, slots, capacity, max_waiting
        self._deliver = deliver
        self._groups: dict[tuple[str, bool], _Group] = {}
        # A conversation, the length of the usual prefix, and that prefix's keys and values once they are needed.
        self._prefixes: dict[str, tuple[Rendered, int, Tensor]] = {}
        self._lock = threading.Condition()
        self._cancelled: list[Job] = []
        self._calls: list[Callable[[], object]] = []
        self._closing = False
        self._waiting = 0
        self._expected = 0
        self._thread = threading.Thread(target=self._run, name="embedgrad scheduler", daemon=True)

    def know(self, served: ServedModel) -> None:
        """Works a served model's usual prefix out. Before the first job of the model."""
        sequence, length = served.prefix()
        self._prefixes[served.name] = sequence, length, torch.empty(0)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; running jobs get no end."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        self._thread.join(timeout=60)

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for a slot."""
        return self._waiting

    @property
    def running(self) -> int:
        """Number of answers that are being written."""
        return sum(len(group.running) for group in list(self._groups.values()))

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues jobs. Raises Full where more would wait than may, ConfigError where so many never may."""
        if len(jobs) > self._max_waiting:
            raise ConfigError(
                f"the request asks for {len(jobs)} answers, and at most {self._max_waiting} may wait; ask for fewer."
            )
        with self._lock:
            if self._waiting + len(jobs) > self._max_waiting:
                raise Full(f"{self._waiting} answers wait already; try again later.")
            for job in jobs:
                self._group(job).waiting.append(job)
            self._waiting += len(jobs)
            self._lock.notify()

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """While a request is made into jobs: a group that is idle waits a moment for it."""
        with self._lock:
            self._expected += 1
        try:
            yield
        finally:
            with self._lock:
                self._expected -= 1
                self._lock.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Ends jobs that nobody waits for any more. Their callbacks are not called."""
        with self._lock:
            for job in jobs:
                job.cancelled = True
            self._cancelled += jobs
            self._lock.notify()

    def _group(self, job: Job) -> _Group:
        sequence, length, _ = self._prefixes[job.served.name]
        ids, rows = job.rendered.ids, job.rendered.prompt_rows
        begins = ids[:length] == sequence.ids[:length] and rows[:length] == sequence.prompt_rows[:length]
        usual = len(ids) > length and begins
        job.cached = length if usual else 0
        key = job.served.name, usual
        return self._groups.setdefault(key, _Group(job.served, usual))

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._closing or self._cancelled or self._busy()):
                    self._lock.wait()
                if self._closing:
                    return
            self._forget_cancelled()
            for group in list(self._groups.values()):
                if group.waiting or group.running:
                    self._take_turn(group)
                if not (group.waiting or group.running):
                    group.writer = None  # the memory of its answers' keys and values is free again

    def _busy(self) -> bool:
        return any(group.waiting or group.running for group in self._groups.values())

    def _take_turn(self, group: _Group) -> None:
        """Writes answers of a group, and lets newcomers enter, until it has none or its turn is over."""
        end = time.monotonic() + TURN
        try:
            while group.waiting or group.running:
                if not group.running:
                    self._gather(group)
                with self._model.lock:
                    writer = self._writer(group)
                    self._enter(group, writer)
                    if group.running:
                        writer.run(0, lambda writer=writer: self._interrupts(group, writer, end))  # type: ignore[misc]
                if self._closing or (time.monotonic() >= end and self._others(group)):
                    break
                self._forget_cancelled()
        except Exception as error:  # the others go on
            self._fail(group, error)
        self._flush()

    def _fail(self, group: _Group, error: Exception) -> None:
        """Ends the running jobs of a group with an error; where none had entered yet, those that wait."""
        reason = error if isinstance(error, EmbedGradError) else EmbedGradError(f"the engine failed: {error}.")
        failed, group.running, group.writer = list(group.running), set(), None
        if not failed:
            with self._lock:
                failed = list(group.waiting)
                group.waiting.clear()
                self._waiting -= len(failed)
        self._calls += [partial(job.on_end, reason) for job in failed if not job.cancelled]

    def _others(self, group: _Group) -> bool:
        """Whether another group has something to write."""
        return any((other.waiting or other.running) and other is not group for other in list(self._groups.values()))

    def _writer(self, group: _Group) -> Writer:
        if group.writer is not None:
            return group.writer
        model, served = self._model, group.served
        sequence, length, prefix = self._prefixes[served.name]
        if group.usual and length and not prefix.numel():
            prefix = prefill_prefix(model, served.embeddings, sequence, length)
            self._prefixes[served.name] = sequence, length, prefix
        if not (group.usual and length):
            prefix = prefill_prefix(model, served.embeddings, sequence, 0)
        group.writer = Writer(
            model, served.embeddings, prefix, served.limits, self._slots, self._capacity,
            lambda slots: loop_for(model, slots, each_token=True),
        )  # fmt: skip
        return group.writer

    def _gather(self, group: _Group) -> None:
        """Waits for requests that come together, before an idle group begins: one prefill costs less than several.

        Those that are being read are known. Clients whose answers ended together ask again together.
        """
        until = time.monotonic() + GATHER
        with self._lock:
            while len(group.waiting) < self._slots and not (self._closing or self._cancelled or self._others(group)):
                returning = group.ended_at + RETURN if len(group.waiting) < group.ended else 0.0
                left = (until if self._expected else min(until, returning)) - time.monotonic()
                if left <= 0:
                    return
                self._lock.wait(left)

    def _enter(self, group: _Group, writer: Writer) -> None:
        entering: list[Job] = []
        with self._lock:
            free, tokens = len(writer.slots.free()), 0
            while group.waiting and len(entering) < free and (not entering or tokens < PREFILL):
                job = group.waiting.popleft()
                self._waiting -= 1
                if not job.cancelled:
                    entering.append(job)
                    tokens += len(job.rendered.ids) - writer.prefix_length
        group.since = 0
        if entering:
            group.running.update(entering)  # before the prefill, so that its failure reaches them
            writer.enter([self._request(group, job) for job in entering])

    def _request(self, group: _Group, job: Job) -> Request:
        def end(result: Generation | EmbedGradError) -> None:
            group.running.discard(job)
            now = time.monotonic()
            group.ended = group.ended + 1 if now - group.ended_at < RETURN else 1
            group.ended_at = now
            self._calls.append(lambda: job.on_end(result))

        def took(id: int, log_probability: float, logits: Tensor | None) -> None:
            top = None if logits is None else _likeliest(logits, job.top)
            self._calls.append(lambda: job.on_token(id, log_probability, top))  # type: ignore[misc]

        job.request = Request(
            job.rendered, job.sampling, end, end, job.stream, job.choice, took if job.on_token else None, job.top > 0
        )
        return job.request

    def _interrupts(self, group: _Group, writer: Writer, end: float) -> bool:
        """Called after each step: hands the tokens out, and says whether the loop must end."""
        self._flush()
        if self._closing or self._cancelled or self._model.lock.wanted:
            return True
        if group.waiting:
            group.since += 1
            free, waiting = len(writer.slots.free()), len(group.waiting)
            patience = PATIENCE if waiting > free else len(group.running) // BUSY
            if min(free, waiting) >= max(1, self._slots // REFILL) or (free and group.since >= patience):
                return True
        return time.monotonic() >= end and self._others(group)

    def _forget_cancelled(self) -> None:
        with self._lock:
            gone, self._cancelled = self._cancelled, []
            for group in self._groups.values():
                kept = deque(job for job in group.waiting if not job.cancelled)
                self._waiting -= len(group.waiting) - len(kept)
                group.waiting = kept
        for job in gone:
            for group in list(self._groups.values()):
                if job in group.running and group.writer is not None and job.request is not None:
                    group.writer.cancel(job.request)
                    group.running.discard(job)

    def _flush(self) -> None:
        if self._calls:
            calls, self._calls = self._calls, []
            self._deliver(calls)


def _likeliest(logits: Tensor, count: int) -> tuple[list[int], list[float]]:
    """(ids, log-probabilities) of the likeliest tokens of a row of logits [V]."""
    log_p = logits.float().log_softmax(dim=0)
    values, ids = log_p.topk(min(count, len(log_p)))
    return ids.tolist(), values.tolist()
