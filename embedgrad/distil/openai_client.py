"""A client of an OpenAI-compatible address, as small as asking for one answer needs. Python's own library only."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from embedgrad.util.errors import ModelError
from embedgrad.util.shown import first_line, short

RETRIES = 3  # further attempts after an answer that says "later", or none
_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds; the pause doubles with each attempt
_LARGEST = 1 << 24  # bytes of an answer
_LATER = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses after which a second attempt may succeed


class Unanswered(Exception):
    """A request without a usable answer after all attempts; its text says why."""


@dataclass(frozen=True)
class Client:
    """Asks `model` at `address`, such as http://localhost:8000/v1.

    key: sent as a bearer token where it is given; it stands in no message. timeout: seconds for one attempt. pause:
    what waits some seconds.
    """

    address: str
    model: str
    key: str | None = None
    timeout: float = 60.0
    pause: Callable[[float], None] = time.sleep

    def answer(self, messages: Any, max_tokens: int) -> str:
        """The greedy answer to chat messages, or to a plain text.

        Raises Unanswered, and ModelError where no request can succeed: a wrong key, address, model or body.
        """
        body: dict[str, Any] = {"model": self.model, "temperature": 0, "max_tokens": max_tokens}
        chat = not isinstance(messages, str)
        body["messages" if chat else "prompt"] = messages
        found = self._ask("/chat/completions" if chat else "/completions", body)
        try:
            choice = found["choices"][0]
            text = choice["message"]["content"] if chat else choice["text"]
        except (KeyError, IndexError, TypeError):
            raise Unanswered("the answer has no choices[0] with a text") from None
        return text if isinstance(text, str) else ""  # null where the model wrote nothing

    def _ask(self, path: str, body: Any = None) -> Any:
        problem = ""
        for attempt in range(RETRIES + 1):
            try:
                return self._once(path, body)
            except _Later as later:
                problem = str(later)
                if attempt < RETRIES:
                    wait = _PAUSE * 2**attempt if later.wait is None else later.wait
                    self.pause(min(wait, _LONGEST_PAUSE))
        raise Unanswered(problem)

    def _once(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address.rstrip("/") + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                text = response.read(_LARGEST)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except TimeoutError:
            raise _Later(f"no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            told = "no answer in time" if isinstance(reason, TimeoutError) else first_line(reason)
            raise _Later(told) from None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise _Later("the answer is not JSON") from None

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        if error.code in _LATER:
            wait = error.headers.get("Retry-After", "") if error.headers is not None else ""
            return _Later(f"status {error.code}", float(wait) if wait.isdigit() else None)
        told = {401: "the key is missing or wrong", 403: "the key may not do this", 404: "there is no such address or "
                "model"}.get(error.code, "the request is refused")  # fmt: skip
        return ModelError(f"the judge at {self.address} answers {error.code}, {told}: {short(said, 300)}.")


class _Later(Exception):
    def __init__(self, told: str, wait: float | None = None) -> None:
        super().__init__(told)
        self.wait = wait


def connect(address: str, model: str | None, key: str | None, timeout: float = 60.0) -> Client:
    """A client of `address`. model: None: the only model there is at the address. Raises ModelError."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ModelError(f"{short(address)} is no address; give one such as http://localhost:8000/v1.")
    if model is not None:
        return Client(address, model, key, timeout)
    asking = Client(address, "", key, timeout)
    try:
        listed = asking._ask("/models")
    except Unanswered as error:
        raise ModelError(f"the judge at {address} does not answer ({error}); start it, or correct --judge.") from None
    entries = listed.get("data") if isinstance(listed, dict) else None
    ids = [one.get("id") for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    names = [name for name in ids if isinstance(name, str)]
    if len(names) != 1:
        told = ", ".join(names[:8]) if names else "none that it names"
        raise ModelError(f"the judge at {address} has {len(names)} models ({told}); choose one with --judge-model.")
    return Client(address, names[0], key, timeout)
