"""How fast does `embedgrad serve` answer many clients, beside `generate` and llama.cpp's server on the exported file?

Clients send chats to a server of their own process, each the next one when it has its answer, and keep what they get,
which is read when the clock has stopped. All contenders have the same prompt, queries, threads and number of answers at
a time, and answer greedily. `generate` has no clients: it gets the queries of all of them in one call, which is the
most that our server can reach. llama.cpp serves the GGUF file that `embedgrad export` makes of model and prompt, with
its prompt cache on; it brings its own HTTP server. A rate is new tokens per second from the first request to the last
answer, prefill included. "Equal" is the share of the answers that are those of `generate`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness import files
from bench.harness.arguments import positive
from bench.harness.files import ModelFile
from bench.harness.markdown import table
from bench.harness.rows import Row, row
from bench.harness.worker import Worker, environment, serve, workers
from bench.harness.writers import PROMPT_TOKENS, SEQUENCE_TOKENS, llama_server, long_prompt

THINGS = ("river", "planet", "tool", "animal", "song", "city", "plant", "game", "metal", "colour", "letter", "bridge")
SLOTS = 32  # most answers at a time
NAME = "prompt"
SERVE, STREAM, GENERATE, LLAMA = "embedgrad serve", "embedgrad serve, streams", "embedgrad generate", "llama.cpp"
CHECKS = ("tests/serve/test_server.py::test_answers_are_those_of_generate_for_many_clients_at_once",)


@dataclass
class Answers:
    """What one round brought: texts by query, and new tokens."""

    seconds: float
    tokens: int = 0
    texts: dict[str, str] = field(default_factory=dict)


Round = Callable[[Sequence[Sequence[str]], int], Answers]
"""(queries of each client, most new tokens of an answer) → the answers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    files.add_argument(parser)
    parser.add_argument("--clients", nargs="*", type=positive, default=None, help="default: 1 8 32 64")
    parser.add_argument("--requests", type=positive, default=4, help="of each client, one after the other (default 4)")
    parser.add_argument("--tokens", type=positive, default=64, help="longest answer (default 64)")
    parser.add_argument("--repeats", type=positive, default=2, help="rounds that count (default 2)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--worker", choices=(GENERATE, LLAMA), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prompt", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--slots", type=positive, default=SLOTS, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> list[Row]:
    """Measure; the rows."""
    if args.worker == GENERATE:
        _generate(args.path, args.prompt)
    elif args.worker == LLAMA:
        _llama(args.path, args.slots, args.threads)
    if args.worker:
        return []
    with files.model_files(args.model) as found:
        return [one for file in found for one in _of_file(file, args)]


def _of_file(file: ModelFile, args: argparse.Namespace) -> list[Row]:
    rows = []
    print(f"{file.title} ({file.types})", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        prompt, exported = Path(folder) / f"{NAME}.safetensors", Path(folder) / "exported.gguf"
        _prepare(file.path, prompt, exported)
        for clients in args.clients or ([8] if args.quick else [1, 8, 32, 64]):
            rows += _of_clients(file, clients, prompt, exported, args)
    return rows


def _prepare(model: Path, prompt: Path, exported: Path) -> None:
    """Writes the prompt and, where llama.cpp can take part, the GGUF file with it."""
    import embedgrad

    loaded = embedgrad.load_model(model, weights="stored")
    long_prompt(loaded).save(prompt)
    if importlib.util.find_spec("xllamacpp") is None:
        print("llama.cpp is left out: `pip install xllamacpp` brings it.")
    elif model.suffix != ".gguf":
        print("llama.cpp is left out: the model is no GGUF file.")
    else:
        embedgrad.export([prompt], to="gguf", model=model, out=exported, check=False)


def _of_clients(file: ModelFile, clients: int, prompt: Path, exported: Path, args: argparse.Namespace) -> list[Row]:
    slots, threads = min(clients, SLOTS), args.threads
    common = ("--threads", str(threads), "--slots", str(slots))
    asked: dict[str, Sequence[str]] = {
        GENERATE: ("--worker", GENERATE, "--path", str(file.path), "--prompt", str(prompt), *common)
    }
    if exported.exists():
        asked[LLAMA] = ("--worker", LLAMA, "--path", str(exported), *common)
    found: dict[str, list[Answers]] = {}
    with workers("serve", asked, threads) as running, _our_server(file.path, prompt, slots, threads) as address:
        rounds: dict[str, Round] = {
            GENERATE: lambda queries, tokens: _called(running[GENERATE], queries, tokens, slots),
            SERVE: lambda queries, tokens: asyncio.run(_clients(address, queries, tokens, stream=False)),
            STREAM: lambda queries, tokens: asyncio.run(_clients(address, queries, tokens, stream=True)),
        }
        if LLAMA in running:
            llama = running[LLAMA].ready["address"]
            rounds[LLAMA] = lambda queries, tokens: asyncio.run(_clients(llama, queries, tokens, stream=False))
        for number in range(args.repeats + 1):  # the first round is short and not counted
            queries = _queries(clients, args.requests if number else 1, number)
            for name, ask in rounds.items():
                answers = ask(queries, args.tokens if number else 4)
                if number:
                    found.setdefault(name, []).append(answers)
        versions = {LLAMA: running[LLAMA].ready["version"]} if LLAMA in running else {}
        versions[GENERATE] = running[GENERATE].ready["version"]
    case = {"model": file.title, "types": file.types, "clients": clients, "slots": slots, "requests": args.requests,
            "tokens": args.tokens, "prompt": PROMPT_TOKENS, "threads": threads, "device": "cpu"}  # fmt: skip
    rows = []
    for name, of_rounds in found.items():
        rates = [answers.tokens / answers.seconds for answers in of_rounds]
        right = [answers.texts[query] == text
                 for answers, ours in zip(of_rounds, found[GENERATE], strict=True)
                 for query, text in ours.texts.items()]  # fmt: skip
        equal = sum(right) / len(right)
        version = versions.get(name, versions[GENERATE])
        rows.append(row("serve", name, version, rates, case=case, unit="tokens/s", equal=equal))
    print(f"{clients} clients: " + ", ".join(f"{r.contender} {r.median:.0f} tokens/s" for r in rows), flush=True)
    return rows


def _queries(clients: int, requests: int, number: int) -> list[list[str]]:
    """The queries of each client, which no earlier round has had."""
    return [
        [f"Tell me about {THINGS[(c + r) % len(THINGS)]} {10000 * number + 100 * r + c} and where it comes from."
         for r in range(requests)]
        for c in range(clients)
    ]  # fmt: skip


# ---- clients ---------------------------------------------------------------------------------------------------------


async def _clients(address: str, queries: Sequence[Sequence[str]], tokens: int, stream: bool) -> Answers:
    """Asks; what the clients have got is read after the clock has stopped, for they share the cores with the server."""
    import aiohttp

    answers, bodies = Answers(0.0), {}

    async def client(http: aiohttp.ClientSession, own: Sequence[str]) -> None:
        for query in own:
            body = {"model": NAME, "messages": [{"role": "user", "content": query}], "temperature": 0.0,
                    "max_tokens": tokens, "stream": stream}  # fmt: skip
            if stream:
                body["stream_options"] = {"include_usage": True}
            async with http.post(f"{address}/v1/chat/completions", json=body, raise_for_status=True) as response:
                bodies[query] = await response.read()

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        started = time.perf_counter()
        await asyncio.gather(*(client(http, own) for own in queries))
        answers.seconds = time.perf_counter() - started
    for query, content in bodies.items():
        answers.texts[query], new = _read_stream(content) if stream else _read_whole(content)
        answers.tokens += new
    return answers


def _read_whole(content: bytes) -> tuple[str, int]:
    """The text of a response, and its new tokens."""
    response = json.loads(content)
    return response["choices"][0]["message"]["content"], response["usage"]["completion_tokens"]


def _read_stream(content: bytes) -> tuple[str, int]:
    """The text of a stream, and its new tokens."""
    events = [json.loads(line[6:]) for line in content.decode().splitlines() if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    return text, events[-1]["usage"]["completion_tokens"]


# ---- contenders ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _our_server(model: Path, prompt: Path, slots: int, threads: int) -> Iterator[str]:
    command = [sys.executable, "-m", "embedgrad", "serve", str(model), str(prompt), "--name", NAME, "--port", "0",
               "--slots", str(slots), "--context", str(SEQUENCE_TOKENS), "--weights", "stored"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(threads)) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+?:\d+", process.stdout.readline())
            if found is None:
                raise SystemExit("embedgrad serve has not started; its message stands above.")
            yield found[0]
        finally:
            process.terminate()


def _called(worker: Worker, queries: Sequence[Sequence[str]], tokens: int, slots: int) -> Answers:
    """All clients' first queries, then all second ones and so on, in one call."""
    in_turn = [query for of_turn in zip(*queries, strict=True) for query in of_turn]
    answer = worker.ask(queries=in_turn, tokens=tokens, slots=slots)
    return Answers(answer["seconds"], answer["tokens"], dict(zip(in_turn, answer["texts"], strict=True)))


def _generate(path: Path, prompt: Path) -> None:
    """The worker of `generate`."""
    import embedgrad

    model = embedgrad.load_model(path, weights="stored")
    tuned = embedgrad.SoftPrompt.load(prompt, model)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        sampling = embedgrad.Sampling(max_new_tokens=request["tokens"])
        started = time.perf_counter()
        found = embedgrad.generate(model, tuned, request["queries"], sampling, batch_size=request["slots"])
        seconds = time.perf_counter() - started
        tokens = sum(len(one.log_probabilities) for one in found)
        return {"seconds": seconds, "tokens": tokens, "texts": [one.text for one in found]}

    serve({"version": f"embedgrad {embedgrad.__version__}, backend {model.backend}"}, answer)


def _llama(path: Path, slots: int, threads: int) -> None:
    """The worker with llama.cpp's server; it serves until standard input ends."""
    server, version = llama_server(path, slots, threads, port=0)
    serve({"version": version, "address": server.listening_address}, lambda request: {})


# ---- documents -------------------------------------------------------------------------------------------------------


def _groups(rows: Sequence[Row]) -> dict[int, dict[str, Row]]:
    found: dict[int, dict[str, Row]] = {}
    for one in rows:
        found.setdefault(int(one.case["clients"]), {})[one.contender] = one
    return found


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`serve`: for every file and number of clients, rates beside `generate` and llama.cpp."""
    heads = ("clients", "", "tokens/s", "20..80 %", "of `generate`", "of llama.cpp's server", "equal")
    parts = []
    for title, of_model in files.by_model(rows).items():
        cells: list[Sequence[object]] = []
        for clients, by_name in _groups(of_model).items():
            most, other = by_name[GENERATE].median, by_name.get(LLAMA)
            for number, (name, one) in enumerate(by_name.items()):
                cells.append((
                    clients if number == 0 else None, name, f"{one.median:.0f}", f"{one.low:.0f}..{one.high:.0f}",
                    f"{one.median / most:.2f}", f"{one.median / other.median:.2f}×" if other else None,
                    f"{one.more['equal']:.0%}",
                ))  # fmt: skip
        parts += [f"**{title}**", table(heads, cells)]
    return {"serve": "\n\n".join(parts)}


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """None."""
    return {}
