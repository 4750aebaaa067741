"""A response that is written while its answers are: server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from embedgrad.generation.writer import Generation
from embedgrad.serve.answers import FINISH, Chosen, Envelope
from embedgrad.serve.bodies import ChatBody, CompletionBody
from embedgrad.serve.exchange import Exchange, Gone
from embedgrad.serve.http import Refusal
from embedgrad.serve.text_stream import TextStream
from embedgrad.util.errors import EmbedGradError

STALLED = 60.0  # seconds after which a client that reads nothing is given up
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one for each event


class EventStream(Response):
    """Streams the answers of an exchange.

    on_end: called once with the status for the metrics. on_first: called at the first token.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        exchange: Exchange,
        envelope: Envelope,
        body: ChatBody | CompletionBody,
        on_end: Callable[[str], object],
        on_first: Callable[[], object],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._exchange, self._envelope, self._body = exchange, envelope, body
        self._on_end, self._on_first = on_end, on_first
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self._texts = [TextStream(envelope.tokenizer, stops) for _ in range(len(exchange))]
        self._shown: list[list[Chosen]] = [[] for _ in range(len(exchange))]  # tokens without an event as yet
        self._begun = [False] * len(exchange)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = "gone"
        watch = _Watch(send)
        try:
            with watch.cancelled_if_stalled():
                await watch.send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                status = await self._write(receive, watch)
                await watch.send({"type": "http.response.body", "body": b"", "more_body": False})
        except (Gone, OSError):
            pass
        finally:
            self._exchange.close()
            self._on_end(status)

    async def _write(self, receive: Receive, watch: _Watch) -> str:
        """Sends all events. Returns the status for the metrics."""
        status = "200"
        try:
            async with contextlib.aclosing(self._exchange.events(receive)) as batches:
                async for batch in batches:
                    events = "".join([self._event(index, event) for index, event in batch])
                    if events:
                        await watch.send_text(events)
            options = self._body.stream_options
            rest = _line(self._envelope.last(self._exchange.usage)) if options and options.include_usage else ""
        except EmbedGradError as error:
            rest, status = _line(Refusal(500, str(error)).body()), "500"
        await watch.send_text(f"{rest}data: [DONE]\n\n")
        return status

    def _event(self, index: int, event: Chosen | Generation) -> str:
        """What tells a token or the end of an answer; empty where nothing is to be told as yet."""
        if isinstance(event, Generation):
            return self._piece(index, self._texts[index].end(event.text), FINISH[event.stop_reason])
        if not any(self._begun):
            self._on_first()
        self._shown[index].append(event)
        text = self._texts[index].add(event.id)
        return self._piece(index, text, None) if text or not self._begun[index] else ""

    def _piece(self, index: int, text: str, finish: str | None) -> str:
        shown = None if self._body.top is None else self._shown[index]
        piece = self._envelope.piece(index, text, shown, finish, not self._begun[index])
        self._shown[index], self._begun[index] = [], True
        return _line(piece)


class _Watch:
    """Sends, and gives a client up that reads nothing for STALLED seconds.

    One timer watches all that is sent: a timer for each event would cost more than the event.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._since: float | None = None  # when the present call of `send` began

    @contextlib.contextmanager
    def cancelled_if_stalled(self) -> Iterator[None]:
        """Cancels its body where a call of `send` takes too long."""
        loop = asyncio.get_running_loop()
        timers: list[asyncio.TimerHandle] = []

        def look() -> None:
            if self._since is not None and loop.time() - self._since >= STALLED:
                scope.cancel()
            else:
                timers[:] = [loop.call_later(STALLED / 4, look)]

        with anyio.CancelScope() as scope:
            look()
            try:
                yield
            finally:
                timers[0].cancel()

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Sends an ASGI message."""
        self._since = asyncio.get_running_loop().time()
        await self._send(message)
        self._since = None

    async def send_text(self, text: str) -> None:
        """Sends a part of the body."""
        await self.send({"type": "http.response.body", "body": text.encode(), "more_body": True})


def _line(body: dict[str, Any]) -> str:
    return f"data: {_JSON.encode(body)}\n\n"
