"""A response that is written while its answers are: server-sent events."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from embedgrad.serve.answers import FINISH, Chosen, Envelope
from embedgrad.serve.bodies import ChatBody, CompletionBody
from embedgrad.serve.exchange import Exchange, Gone
from embedgrad.serve.http import Refusal
from embedgrad.serve.text_stream import TextStream
from embedgrad.util.errors import EmbedGradError

STALLED = 60.0  # seconds after which a client that reads nothing is given up


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
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            status = await self._write(receive, send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (Gone, OSError, TimeoutError):
            pass
        finally:
            self._exchange.close()
            self._on_end(status)

    async def _write(self, receive: Receive, send: Send) -> str:
        """Sends all events. Returns the status for the metrics."""
        status = "200"
        try:
            async with contextlib.aclosing(self._exchange.events(receive)) as events:
                async for index, event in events:
                    if isinstance(event, Chosen):
                        await self._token(send, index, event)
                    else:
                        text = self._texts[index].end(event.text)
                        await self._piece(send, index, text, FINISH[event.stop_reason])
            options = self._body.stream_options
            if options is not None and options.include_usage:
                await _send(send, self._envelope.last(self._exchange.usage))
        except EmbedGradError as error:
            await _send(send, Refusal(500, str(error)).body())
            status = "500"
        await _event(send, "[DONE]")
        return status

    async def _token(self, send: Send, index: int, token: Chosen) -> None:
        if not any(self._begun):
            self._on_first()
        self._shown[index].append(token)
        text = self._texts[index].add(token.id)
        if text or not self._begun[index]:
            await self._piece(send, index, text, None)

    async def _piece(self, send: Send, index: int, text: str, finish: str | None) -> None:
        shown = None if self._body.top is None else self._shown[index]
        piece = self._envelope.piece(index, text, shown, finish, not self._begun[index])
        self._shown[index], self._begun[index] = [], True
        await _send(send, piece)


async def _send(send: Send, body: dict[str, Any]) -> None:
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    await _event(send, content)


async def _event(send: Send, data: str) -> None:
    with anyio.fail_after(STALLED):
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
    await anyio.sleep(0)  # else a burst of events would be written before the event loop sees that the client has gone
