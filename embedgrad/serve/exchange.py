"""One request's answers on their way from the scheduler's thread to the client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from embedgrad.generation.sampling import Sampling
from embedgrad.generation.writer import Generation
from embedgrad.prompt.rendering import Rendered
from embedgrad.serve.answers import Chosen, Top, Usage
from embedgrad.serve.scheduler import Job, Scheduler
from embedgrad.serve.served import ServedModel
from embedgrad.util.errors import EmbedGradError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Gone(Exception):
    """The client has closed its connection."""


class Exchange:
    """The jobs of one request, and what they have written so far.

    inputs: each gets n answers, one after another; answer i of the request has the stream of random numbers i, as in
    `generate`. tokens: whether tokens are delivered one by one. top: likeliest tokens that are delivered with each.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        served: ServedModel,
        inputs: Sequence[Rendered],
        n: int,
        sampling: Sequence[Sampling],
        choice: Any,
        *,
        tokens: bool,
        top: int,
    ) -> None:
        self._scheduler = scheduler
        self._arrived: list[tuple[int, Chosen | Generation | Exception]] = []
        self._wake = asyncio.Event()
        self._jobs: list[Job] = []
        self._open = 0
        self.usage = Usage()
        self._inputs, self._n, self._tokens, self._top = inputs, n, tokens, top
        for rendered, each in zip(inputs, sampling, strict=True):
            for _ in range(n):
                self._jobs.append(self._job(served, rendered, each, choice, len(self._jobs)))

    def _job(self, served: ServedModel, rendered: Rendered, sampling: Sampling, choice: Any, index: int) -> Job:
        def take(id: int, log_probability: float, likeliest: Top | None) -> None:
            self._arrive(index, Chosen(id, log_probability, likeliest))

        def end(result: Generation | EmbedGradError) -> None:
            self._arrive(index, result)

        return Job(served, rendered, sampling, choice, index, end, take if self._tokens else None, self._top)

    def submit(self) -> None:
        """Queues the jobs. Raises Full."""
        self._scheduler.submit(self._jobs)
        self._open = len(self._jobs)
        self.usage.prompt = sum(len(rendered.ids) for rendered in self._inputs)
        self.usage.cached = sum(job.cached for job in self._jobs[:: self._n])

    def __len__(self) -> int:
        return len(self._jobs)

    def _arrive(self, index: int, event: Chosen | Generation | Exception) -> None:
        self._arrived.append((index, event))
        self._wake.set()

    async def events(self, receive: Receive) -> AsyncGenerator[list[tuple[int, Chosen | Generation]], None]:
        """What has arrived since the last time, as (job, token or answer), until all jobs have ended.

        Whoever leaves early must `close`. Raises the error of a job that failed, and Gone where the client goes.
        """
        watch = asyncio.ensure_future(_gone(receive))
        watch.add_done_callback(lambda _: self._wake.set())
        try:
            while self._open:
                await self._wake.wait()
                self._wake.clear()
                arrived, self._arrived = self._arrived, []
                if watch.done():  # what was written meanwhile has no reader
                    raise Gone
                events: list[tuple[int, Chosen | Generation]] = []
                for index, event in arrived:
                    if isinstance(event, Exception):
                        raise event
                    if isinstance(event, Generation):
                        self._open -= 1
                        self.usage.completion += len(event.log_probabilities)
                    events.append((index, event))
                yield events
        finally:
            watch.cancel()

    def close(self) -> None:
        """Ends the jobs that still run."""
        if self._open:
            self._open = 0
            self._scheduler.cancel(self._jobs)


async def _gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
