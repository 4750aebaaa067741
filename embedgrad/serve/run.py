"""Starts the server: served models, the scheduler's thread, and uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import queue
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from embedgrad.engine.model import Model
from embedgrad.exports.source import prompt_names
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.serve.app import Server
from embedgrad.serve.connection import Connection
from embedgrad.serve.http import Gate
from embedgrad.serve.scheduler import Scheduler
from embedgrad.serve.served import ServedModel
from embedgrad.util.errors import ConfigError
from embedgrad.util.host import available_memory

CONNECTIONS = 1024  # open at once; uvicorn answers 503 to more
_FAREWELL = 10  # seconds that running answers have to end when the server is stopped


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    host, port: where it listens; port 0: any free one. api_keys: accepted keys; empty: everybody. slots: answers that
    are written at the same time. context: tokens of a request and its answer at most; None: the model's, at most
    MOST_CONTEXT. max_tokens: tokens of the longest answer; None: what the context leaves. max_waiting: answers that may
    wait. max_body: bytes of the longest body.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    slots: int = 32
    context: int | None = None
    max_tokens: int | None = None
    max_waiting: int = 256
    max_body: int = 1 << 20


MOST_CONTEXT = 4096  # where the user says nothing: the keys and values of all slots can grow to this length


def served_models(model: Model, prompts: Sequence[Path], names: Sequence[str], bare: str | None) -> list[ServedModel]:
    """The prompts and the bare model under their names. Raises PromptError, ConfigError."""
    chosen = prompt_names(prompts, names)
    found = [ServedModel(model, name, SoftPrompt.load(path, model)) for name, path in zip(chosen, prompts, strict=True)]
    own = bare or model.name
    if own in chosen:
        raise ConfigError(
            f"a prompt and the model are both called {own!r}; name one of them with --name or --bare-name."
        )
    return [*found, ServedModel(model, own, None)]


def serve(models: Sequence[ServedModel], settings: Settings, announce: Callable[[str], object]) -> None:
    """Serves until a signal stops it. announce: announce(address) is called when the server listens.

    Raises ConfigError where a setting does not fit the model or the memory, or the address cannot be used.
    """
    model = models[0].model
    context = context_of(model, settings)
    most = min(settings.max_tokens or context, context)
    calls = _Calls()
    scheduler = Scheduler(
        model, slots=settings.slots, capacity=most, max_waiting=settings.max_waiting, deliver=calls.deliver
    )
    for served in models:
        scheduler.know(served)
    gate = Gate(settings.api_keys, is_loopback(settings.host), settings.max_body)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        calls.start(loop)
        scheduler.start()
        try:
            yield
        finally:
            await loop.run_in_executor(None, scheduler.close)
            calls.close()

    app = Server(models, scheduler, gate, context=context, most=most).app(lifespan)
    with _listening(settings) as listener:
        host, port = listener.getsockname()[:2]
        announce(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        config = uvicorn.Config(  # the log gets no line that a client can repeat at will
            app, http=Connection, ws="none", log_level="error", access_log=False, server_header=False,
            limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=_FAREWELL, timeout_keep_alive=30, lifespan="on",
        )  # fmt: skip
        uvicorn.Server(config).run([listener])


def context_of(model: Model, settings: Settings) -> int:
    """Tokens of a request and its answer at most. Raises ConfigError where the model or the memory has not so many."""
    limit = model.config.max_position
    context = min(limit, MOST_CONTEXT) if settings.context is None else settings.context
    if context > limit:
        raise ConfigError(f"--context is {context}, but the model's context holds {model.config.context_told} tokens.")
    config = model.config
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.dtype.itemsize
    needed, free = token * context * settings.slots, available_memory(model.device)
    if needed > free:
        raise ConfigError(
            f"{settings.slots} answers of {context} tokens would need {needed / 2**30:.1f} GiB for their keys and "
            f"values, and {free / 2**30:.1f} are free; lower --slots or --context."
        )
    return context


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Calls:
    """Brings the scheduler's callbacks into the event loop, by a thread of its own.

    The loop is woken by a system call, which gives the interpreter's lock away. The event loop would take it and write
    to all clients before the scheduler's thread could go on to the next token.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Sequence[Callable[[], object]] | None] = queue.SimpleQueue()
        self.deliver = self._queue.put  # which keeps the lock

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread."""
        threading.Thread(target=self._run, args=(loop,), name="embedgrad messenger", daemon=True).start()

    def close(self) -> None:
        """Ends the thread."""
        self._queue.put(None)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        while (calls := self._queue.get()) is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(_all, calls)


def _all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


@contextlib.contextmanager
def _listening(settings: Settings) -> Any:
    """A socket that listens. Raises ConfigError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {settings.host} cannot be used: {error}.") from error
    with listener:
        try:
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(CONNECTIONS)  # whoever reads the address may connect at once, and waits for uvicorn
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot listen on {settings.host} port {settings.port}: {reason}; choose another --port."
            ) from error
        yield listener
