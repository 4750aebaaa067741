"""Connections that clients keep open without asking or reading anything."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn")

from embedgrad.serve import connection as module  # noqa: E402

LONG = 1 << 25  # bytes; more than the system's buffers hold


async def _app(scope: Any, receive: Any, send: Any) -> None:
    body = b"x" * (LONG if scope["path"] == "/long" else 2)
    head = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, int]]:
    monkeypatch.setattr(module, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(module, "REST_SECONDS", 0.5)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(_app, http=module.Connection, ws="none", log_level="error", lifespan="off")
    found = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(found.serve([listener])))
    thread.start()
    try:
        yield found, listener.getsockname()[1]
    finally:
        found.should_exit = True
        thread.join(timeout=30)
        listener.close()


def _closed(server: Any) -> bool:
    until = time.monotonic() + 20
    while server.server_state.connections and time.monotonic() < until:
        time.sleep(0.05)
    return not server.server_state.connections


@pytest.mark.parametrize(
    "sent",
    [
        [],
        [b"POST / HT"],
        [b"GET / HTTP/1.1\r\nHost: x\r\n"],
        [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /"],
        [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
    ],
    ids=["nothing", "a line", "headers", "a second request", "an idle connection"],
)
def test_a_head_that_does_not_arrive_ends_the_connection(server: Any, sent: list[bytes]) -> None:
    found, port = server
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(20)
        for part in sent:
            client.sendall(part)
            time.sleep(0.1)
        got = b""
        while piece := client.recv(1000):
            got += piece
    assert got.count(b"200 OK") == sum(part.endswith(b"\r\n\r\n") for part in sent)
    assert _closed(found)


def test_drips_do_not_keep_a_connection_open(server: Any) -> None:
    found, port = server
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        for number in range(20):  # two seconds
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                client.sendall(f"X-{number}: x\r\n".encode())
        assert _closed(found)


def test_a_response_that_nobody_reads_is_given_up(server: Any) -> None:
    found, port = server
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        assert _closed(found)


def test_a_response_that_is_read_slowly_arrives(server: Any) -> None:
    _, port = server
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        got = 0
        while got < LONG:
            piece = client.recv(1 << 21)
            assert piece
            got += len(piece)
            time.sleep(0.03)
