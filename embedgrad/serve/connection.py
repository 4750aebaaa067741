"""A connection to a client, which uvicorn's own would keep for as long as the client likes."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0  # for the whole head of a request, from the connection or the end of the response before
REST_SECONDS = 60.0  # in which a client must read something of a response that is complete


class Connection(H11Protocol):
    """Closes connections on which the head of a request does not arrive, or whose response is not read.

    uvicorn bounds the time between two requests only, and only until the next byte comes. `Gate.body` bounds the time
    of a body, `EventStream` that of a stream. h11 bounds a head's length, which uvicorn's other parser does not.
    """

    _head: asyncio.TimerHandle | None = None
    _rest: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time of the first head."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Ends the time of a head that has arrived."""
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """Starts the time of the next head."""
        super().on_response_complete()
        self._watch_head()
        self._watch_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the timers."""
        super().connection_lost(exc)
        for timer in (self._head, self._rest):
            if timer is not None:
                timer.cancel()

    def _watch_head(self) -> None:
        arrived = self.cycle is not None and not self.cycle.response_complete
        if self._head is not None and arrived:
            self._head.cancel()
            self._head = None
        if self._head is None and not arrived and not self.transport.is_closing():
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _watch_rest(self, before: int | None = None) -> None:
        """before: bytes that were still unread REST_SECONDS ago."""
        unread = self.transport.get_write_buffer_size()
        if unread and before is not None and unread >= before:
            self.transport.abort()
        elif unread:
            self._rest = self.loop.call_later(REST_SECONDS, self._watch_rest, unread)
