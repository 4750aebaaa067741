"""An OpenAI-compatible server of a few lines, which can fail in every way that a judge may fail."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any, dict[str, str]]
"""Status, body (bytes as they are, or JSON values), headers."""


def said(text: str | None) -> Reply:
    """The reply of a chat completion."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


@contextlib.contextmanager
def server(
    reply: Callable[[dict[str, Any], int], Reply | None], models: tuple[str, ...] = ("judge",)
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(address, the requests so far). reply(body, number of the request); None: no answer for a while."""
    asked: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send((200, {"data": [{"id": name} for name in models]}, {}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
                number = len(asked)
            answer = reply(body, number)
            if answer is None:
                time.sleep(1.0)
                return
            self._send(answer)

        def _send(self, answer: Reply) -> None:
            status, content, headers = answer
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
    finally:
        running.shutdown()
        running.server_close()
