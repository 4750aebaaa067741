"""The server as an ASGI application: models, completions, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from embedgrad.generation.slots import check_bias
from embedgrad.prompt.rendering import Rendered
from embedgrad.serve.answers import Chosen, Envelope, Usage
from embedgrad.serve.bodies import ChatBody, CompletionBody, read
from embedgrad.serve.event_stream import EventStream
from embedgrad.serve.exchange import Exchange, Gone
from embedgrad.serve.http import Gate, Refusal
from embedgrad.serve.metrics import MEDIA_TYPE, Metrics
from embedgrad.serve.openapi import document
from embedgrad.serve.scheduler import Full, Scheduler
from embedgrad.serve.served import ServedModel
from embedgrad.util.errors import ConfigError, ContextError, DataError, EmbedGradError, TemplateError

_Result = TypeVar("_Result")
_Handler = Callable[[Request], Awaitable[Response]]
_ASKED_WRONGLY = (ConfigError, ContextError, DataError, TemplateError)


class Server:
    """Answers HTTP requests.

    models: what clients can name. context: tokens of a request and its answer at most. most: tokens of the longest
    answer.
    """

    def __init__(
        self, models: Sequence[ServedModel], scheduler: Scheduler, gate: Gate, *, context: int, most: int
    ) -> None:
        self._models = {served.name: served for served in models}
        self._scheduler, self._gate, self._context, self._most = scheduler, gate, context, most
        self._metrics = Metrics(scheduler)
        self._created = int(time.time())
        self._renderer = ThreadPoolExecutor(1, "embedgrad renderer")  # a long text must not hold the event loop up

    def app(self, lifespan: Callable[[Any], contextlib.AbstractAsyncContextManager[None]] | None = None) -> Starlette:
        """The application."""
        chat, completions = partial(self._complete, ChatBody), partial(self._complete, CompletionBody)
        routes: list[tuple[str, str, _Handler]] = [
            ("GET", "/health", self._health),
            ("GET", "/metrics", self._told_metrics),
            ("GET", "/openapi.json", self._document),
            ("GET", "/v1/models", self._list),
            ("GET", "/v1/models/{name}", self._show),
            ("POST", "/v1/chat/completions", chat),
            ("POST", "/v1/completions", completions),
        ]
        return Starlette(
            routes=[Route(path, self._guarded(handler), methods=[method]) for method, path, handler in routes],
            exception_handlers={HTTPException: _no_route, Exception: _failed},
            lifespan=lifespan,
        )

    def _guarded(self, handler: _Handler) -> _Handler:
        async def answer(request: Request) -> Response:
            try:
                if request.url.path != "/health":  # which says nothing about anybody
                    self._gate.admit(request)
                return await handler(request)
            except Refusal as refusal:
                return refusal.response()

        return answer

    async def _health(self, request: Request) -> Response:
        if self._scheduler.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the generation has stopped; restart the server"}, 503)

    async def _told_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=MEDIA_TYPE)

    async def _document(self, request: Request) -> Response:
        return JSONResponse(document(list(self._models), bool(self._gate.keys)))

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(served) for served in self._models.values()]})

    async def _show(self, request: Request) -> Response:
        return JSONResponse(self._described(self._served(request.path_params["name"])))

    def _described(self, served: ServedModel) -> dict[str, Any]:
        described = {"id": served.name, "object": "model", "created": self._created, "owned_by": "embedgrad"}
        return {**described, "max_model_len": self._context}

    def _served(self, name: str) -> ServedModel:
        if name not in self._models:
            names = ", ".join(self._models)
            raise Refusal(404, f"there is no model {name[:80]!r}; there are {names}.", "model", "model_not_found")
        return self._models[name]

    async def _complete(self, kind: type[ChatBody] | type[CompletionBody], request: Request) -> Response:
        """Answers a request for completions of a kind."""
        began, name, usage = time.monotonic(), "", Usage()
        try:
            try:
                content = await self._gate.body(request)
                with self._scheduler.expecting():
                    body = read(kind, content)
                    served = self._served(body.model)
                    name = served.name
                    exchange = await self._in_renderer(partial(self._exchange, served, body))
                    exchange.submit()
            except Full as error:
                raise Refusal(429, str(error), code="rate_limit_exceeded") from None
            except _ASKED_WRONGLY as error:
                raise Refusal(400, str(error)) from None
            usage = exchange.usage
            envelope = Envelope(isinstance(body, ChatBody), name, served.model.tokenizer)
            if body.stream:
                ended = partial(self._ended, name, began, usage)
                first = partial(self._first_token, name, began)
                return EventStream(exchange, envelope, body, ended, first)
            answer = await self._whole(exchange, envelope, body, request)
        except Refusal as refusal:
            self._ended(name, began, usage, str(refusal.status))
            raise
        self._ended(name, began, usage, "gone" if answer is None else "200")
        return Response(status_code=204) if answer is None else JSONResponse(answer)

    async def _whole(
        self, exchange: Exchange, envelope: Envelope, body: ChatBody | CompletionBody, request: Request
    ) -> dict[str, Any] | None:
        """The body of a response that is not streamed; None where the client has gone. Raises Refusal."""
        answers: dict[int, Any] = {}
        shown: list[list[Chosen]] = [[] for _ in range(len(exchange))]
        try:
            async with contextlib.aclosing(exchange.events(request.receive)) as events:
                async for arrived in events:
                    for index, event in arrived:
                        if isinstance(event, Chosen):
                            shown[index].append(event)
                        else:
                            answers[index] = event
        except Gone:
            return None
        except EmbedGradError as error:
            raise Refusal(400 if isinstance(error, _ASKED_WRONGLY) else 500, str(error)) from None
        finally:
            exchange.close()
        ordered = [answers[index] for index in range(len(exchange))]
        tokens = [None if body.top is None else _of_answer(shown[i], answer) for i, answer in enumerate(ordered)]
        content: dict[str, Any] = envelope.whole(ordered, tokens, exchange.usage)
        return content

    def _exchange(self, served: ServedModel, body: ChatBody | CompletionBody) -> Exchange:
        """The jobs of a request. Raises EmbedGradError where it cannot be answered."""
        texts = body.texts()
        if isinstance(body, ChatBody):
            messages = [message.plain() for message in body.messages]
            inputs = [served.chat(messages, body.chat_template_kwargs)]
        else:
            inputs = [served.complete(prompt) for prompt in body.prompts()]
        sampling = [body.sampling(min(self._most, self._room(rendered))) for rendered in inputs]
        check_bias(sampling[0], served.model.config.vocab_size)
        tokens = bool(body.stream) or body.top is not None
        choice = served.choice(texts)
        return Exchange(
            self._scheduler, served, inputs, body.n or 1, sampling, choice, tokens=tokens, top=body.top or 0
        )

    def _room(self, rendered: Rendered) -> int:
        """Tokens that an answer to `rendered` may have. Raises ContextError where there is none."""
        room = self._context - len(rendered.ids)
        if room < 1:
            raise ContextError(
                f"the request has {len(rendered.ids)} tokens, and this server takes {self._context} with the answer; "
                f"shorten it."
            )
        return room

    async def _in_renderer(self, action: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._renderer, action)

    def _ended(self, name: str, began: float, usage: Usage, status: str) -> None:
        self._metrics.ended(name, status, time.monotonic() - began, usage)

    def _first_token(self, name: str, began: float) -> None:
        self._metrics.first_token(name, time.monotonic() - began)


def _of_answer(shown: Sequence[Chosen], answer: Any) -> list[Chosen]:
    """The tokens of an answer. Those of a stop text that was cut off are among them, as its ids are."""
    return list(shown[: len(answer.ids)])


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "there is no such path", 405: "this path has another method"}.get(error.status_code, error.detail)
    response = Refusal(error.status_code, f"{message}: {request.method} {request.url.path[:80]}.").response()
    response.headers.update(error.headers or {})
    return response


async def _failed(request: Request, error: Exception) -> Response:
    return Refusal(500, f"the server failed: {type(error).__name__}.").response()
