"""What every request passes: who may ask, how long a body may be, and errors as the OpenAI API tells them."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

BODY_SECONDS = 30.0  # for the whole body of a request
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request that is not answered. status: the HTTP status. message: one sentence. param: the field, if one."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The error's JSON object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as a response."""
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return JSONResponse(self.body(), self.status, headers)


@dataclass(frozen=True)
class Gate:
    """Who may ask.

    keys: accepted API keys; empty: everybody. local: the server listens on the loopback interface, so that without a
    key the Host header must be an address or localhost (else a web page could reach it by a name of its own that leads
    here). max_body: bytes of the longest body.
    """

    keys: Sequence[str]
    local: bool
    max_body: int

    def admit(self, request: Request) -> None:
        """Raises Refusal for a request that may not be answered."""
        if self.keys:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            known = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in self.keys]
            if scheme.lower() != "bearer" or not any(known):
                raise Refusal(401, "the API key is missing or wrong: send Authorization: Bearer KEY.")
        elif self.local and not _is_address(request.headers.get("host", "")):
            raise Refusal(403, "this server listens locally and without a key: ask it by localhost or its address.")

    async def body(self, request: Request) -> bytes:
        """The body of a POST request. Raises Refusal."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"the content type is {kind or 'missing'}, but must be application/json.")
        try:
            return await asyncio.wait_for(self._read(request), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise Refusal(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds.") from None
        except ClientDisconnect:
            raise Refusal(400, "the connection was closed before the whole body was sent.") from None

    async def _read(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.max_body:
                raise Refusal(413, f"the body is longer than {self.max_body:,} bytes.")
            parts.append(part)
        return b"".join(parts)


def _is_address(host: str) -> bool:
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
