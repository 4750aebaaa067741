"""A server in a process of its own, on a tiny model with prompts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.exports.shared import TEMPLATES, tiny_folder, tuned

PROMPTS = ("system", "user after", "text")  # templates of the served prompts


@dataclass
class Running:
    """A running server: its address, process, model folder, and prompt files by name."""

    address: str
    process: subprocess.Popen[str]
    model: Path
    prompts: dict[str, Path]
    stderr: Path

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.address}{path}", json=body, timeout=60, **options)

    def chat(self, model: str, text: str, **fields: Any) -> Any:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        response = self.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return response.json()

    def gauge(self, name: str) -> float:
        lines = httpx.get(f"{self.address}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name)).split()[-1])


@contextlib.contextmanager
def running(folder: Path, *options: str) -> Iterator[Running]:
    model = tiny_folder(folder / "model")
    prompts = {}
    for name in PROMPTS:
        path = folder / f"{name.replace(' ', '-')}.safetensors"
        tuned(model, TEMPLATES[name]).save(path)
        prompts[path.stem] = path
    command = [sys.executable, "-m", "embedgrad", "serve", str(model), *map(str, prompts.values()), "--port", "0"]
    stderr = folder / "stderr.txt"
    with open(stderr, "w") as errors:
        process = subprocess.Popen(
            [*command, "--bare-name", "bare", *options], stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split("/v1:")[0]
        assert address, stderr.read_text()
        yield Running(address, process, model, prompts, stderr)
    finally:
        ended = process.poll()
        assert ended is None, f"the server has ended with code {ended}: {stderr.read_text()[-2000:]}"
        process.terminate()
        process.wait(timeout=30)
        assert "Traceback" not in stderr.read_text()
