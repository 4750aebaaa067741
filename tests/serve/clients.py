"""Clients of a server that behave well, and others that do not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

CHAT = "/v1/chat/completions"
_KILLED = """
import json, sys, urllib.request
head = {"Content-Type": "application/json"}
while True:
    try:
        with urllib.request.urlopen(urllib.request.Request(sys.argv[1], sys.argv[2].encode(), head)) as response:
            response.read()
    except OSError:  # too many answers wait
        pass
"""


@dataclass(frozen=True)
class Case:
    """A request and the texts that must come."""

    body: dict[str, Any]
    texts: list[str]


@dataclass
class Round:
    """What the clients of a round met. wrong: sentences about answers that were lost or mixed up."""

    right: int = 0
    refused: int = 0
    disturbed: int = 0
    wrong: list[str] = field(default_factory=list)


def chat(model: str, query: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat."""
    return {"model": model, "messages": [{"role": "user", "content": query}], **fields}


def storm(
    address: str, cases: Sequence[Case], long: dict[str, Any], seconds: float, honest: int, hostile: int
) -> Round:
    """`honest` clients that compare their answers, and `hostile` ones. long: the body of a long answer."""
    return asyncio.run(_storm(address, cases, long, seconds, honest, hostile))


async def _storm(
    address: str, cases: Sequence[Case], long: dict[str, Any], seconds: float, honest: int, hostile: int
) -> Round:
    found, end = Round(), time.monotonic() + seconds
    ways: list[Callable[..., Any]] = [_vanish, _read_slowly, _send_nonsense, _are_killed]
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        clients = [_honest(http, cases, end, number, found) for number in range(honest)]
        await asyncio.gather(*clients, *(ways[i % 4](address, long, end, i, found) for i in range(hostile)))
    return found


async def _honest(http: httpx.AsyncClient, cases: Sequence[Case], end: float, number: int, found: Round) -> None:
    draw = random.Random(number)
    while time.monotonic() < end:
        case, stream = draw.choice(cases), draw.random() < 0.5
        response = await http.post(CHAT, json={**case.body, "stream": stream})
        if response.status_code == 429:
            found.refused += 1
            await asyncio.sleep(0.05)
            continue
        texts = _streamed(response.text, len(case.texts)) if stream else _whole(response)
        if texts == case.texts:
            found.right += 1
        else:
            found.wrong.append(f"{case.body} gave {response.status_code} {texts}, not {case.texts}")


def _whole(response: httpx.Response) -> list[str]:
    return [choice["message"]["content"] for choice in response.json().get("choices", ())]


def _streamed(content: str, count: int) -> list[str]:
    texts = [""] * count
    for line in content.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:]).get("choices", ()):
                texts[choice["index"]] += choice["delta"].get("content", "")
    return texts if "data: [DONE]" in content else []


async def _connect(address: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which a request has been sent."""
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    writer.write(head.encode() + b"\r\n\r\n" + content)
    return reader, writer


async def _vanish(address: str, long: dict[str, Any], end: float, number: int, found: Round) -> None:
    """Go at any moment of a long answer, with or without a stream."""
    draw = random.Random(number)
    while time.monotonic() < end:
        _, writer = await _connect(address, {**long, "stream": draw.random() < 0.5, "n": draw.randint(1, 4)})
        await asyncio.sleep(draw.choice([0.0, 0.01, 0.1, 0.5]))
        writer.transport.abort()
        found.disturbed += 1


async def _read_slowly(address: str, long: dict[str, Any], end: float, number: int, found: Round) -> None:
    """Read some bytes now and then, and leave in the midst."""
    while time.monotonic() < end:
        reader, writer = await _connect(address, {**long, "stream": True, "logprobs": True, "top_logprobs": 5})
        for _ in range(20):
            if time.monotonic() < end:
                await reader.read(64)
                await asyncio.sleep(0.1)
        writer.close()
        found.disturbed += 1


async def _send_nonsense(address: str, long: dict[str, Any], end: float, number: int, found: Round) -> None:
    """Send what is no request, or the beginning of one."""
    draw = random.Random(number)
    host, port = address.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    while time.monotonic() < end:
        _, writer = await asyncio.open_connection(host, int(port))
        nonsense = [
            draw.randbytes(1000), b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 5000, b"\0" * 70_000, head,
            head + b"Content-Length: 1000\r\n\r\n" + draw.randbytes(10),
            head + b"Transfer-Encoding: chunked\r\n\r\n" + b"ffff\r\n" * 100,
            head + b"Content-Length: 2000000\r\n\r\n" + b"[" * 2_000_000,
        ]  # fmt: skip
        with contextlib.suppress(OSError):
            writer.write(draw.choice(nonsense))
            await asyncio.wait_for(writer.drain(), 5)
        await asyncio.sleep(0.05)
        writer.close()
        found.disturbed += 1


async def _are_killed(address: str, long: dict[str, Any], end: float, number: int, found: Round) -> None:
    """Clients of their own process that end by SIGKILL."""
    while time.monotonic() < end:
        body = json.dumps({**long, "stream": number % 8 < 4})
        client = await asyncio.create_subprocess_exec(sys.executable, "-c", _KILLED, address + CHAT, body)
        await asyncio.sleep(0.6)
        client.kill()
        await client.wait()
        found.disturbed += 1
