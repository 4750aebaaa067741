"""A connection from every rank to rank 0 that carries nothing: when it breaks, a process has died.

Gloo notices a dead neighbour by itself. NCCL does not: its kernels wait on the GPU, and the host waits for them. And a
machine that loses its power or its network closes no connection; TCP's own probes find that out after half a minute.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time

from embedgrad.util.errors import EmbedGradError

_GRACE = 10.0  # seconds that the main thread has to end by itself, with what it wants to save
_BYE = b"b"
_PROBES = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # seconds, seconds, number


class Lifeline:
    """The connections of this process. Rank 0 has one to each of the others, they have one to rank 0."""

    def __init__(self, connections: list[socket.socket]) -> None:
        self._connections = connections
        self._left = 0  # neighbours whose work is done
        self._ended = threading.Event()  # this process's own work is done
        self._lost = threading.Event()
        self._lock = threading.Lock()
        for connection in connections:
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _PROBES:
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            threading.Thread(target=self._watch, args=(connection,), daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether another process has died."""
        return self._lost.is_set()

    def check(self) -> None:
        """Raises RuntimeError where another process has died."""
        if self.lost:
            raise RuntimeError("a process has died")

    def leave(self) -> None:
        """Say that this process ends because its work is done."""
        self._ended.set()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.sendall(_BYE)
        for connection in self._connections:
            _close(connection)

    def _watch(self, connection: socket.socket) -> None:
        try:
            left = connection.recv(1) == _BYE
        except OSError:
            left = False
        if left or self._ended.is_set():
            return
        with self._lock:
            first = not self._lost.is_set()
            self._lost.set()
        if not first:
            return
        for other in self._connections:  # the others learn it from rank 0
            _close(other)
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            time.sleep(0.1)
            if self._ended.is_set():
                return
        sys.stderr.write("embedgrad: another process of this run has died, so this one ends; --resume goes on.\n")
        sys.stderr.flush()
        os._exit(2)


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def listen(address: str) -> socket.socket:
    """A socket at which rank 0 waits for the others: at `address` if it is this machine's, else at all addresses."""
    for host in (address, ""):
        with contextlib.suppress(OSError):
            family = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
            return socket.create_server((host, 0), family=family)
    raise EmbedGradError(f"no port can be opened at {address}, at which the other processes could reach this one.")


def accept(server: socket.socket, others: int, token: str, seconds: float) -> Lifeline:
    """Rank 0's lifeline, once the `others` have come. A connection that does not send `token` is closed."""
    until = time.monotonic() + seconds
    found: list[socket.socket] = []
    with server:
        while len(found) < others:
            server.settimeout(max(0.1, until - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                raise EmbedGradError(f"only {len(found)} of {others} other processes came; start all.") from None
            connection.settimeout(5)
            if _read(connection, len(token)) == token:
                found.append(connection)
            else:
                connection.close()
    return Lifeline(found)


def connect(address: str, port: int, token: str) -> Lifeline:
    """The lifeline of another rank. Raises EmbedGradError where rank 0 cannot be reached."""
    try:
        connection = socket.create_connection((address, port), timeout=20)
        connection.sendall(token.encode())
    except OSError as error:
        raise EmbedGradError(
            f"rank 0 cannot be reached at {address}, port {port}: {error.strerror or error}; open the network between "
            "the machines."
        ) from error
    return Lifeline([connection])


def _read(connection: socket.socket, count: int) -> str:
    data = b""
    with contextlib.suppress(OSError):  # who says nothing, or hangs up, is sent away
        while len(data) < count and (more := connection.recv(count - len(data))):
            data += more
    return data.decode(errors="replace")
