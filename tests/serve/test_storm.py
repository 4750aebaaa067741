"""Sixty-four clients for a minute, a quarter of them hostile: no answer is lost or mixed up, memory does not grow."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import httpx
import pytest

import embedgrad
from tests.serve.clients import Case, chat, storm
from tests.serve.shared import Running, running

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

ROUNDS, SECONDS, WARM = 5, 12.0, 2  # memory pools fill in the first WARM + 1 rounds


def _cases(server: Running) -> list[Case]:
    """Requests with the answers that `generate` gives."""
    model = embedgrad.load_model(server.model)
    found = []
    for (name, path), seed in itertools.product(server.prompts.items(), range(6)):
        prompt = embedgrad.SoftPrompt.load(path, model)
        query, n, most = f"review {seed} is a bore", 1 + seed % 2, (1, 4, 40)[seed % 3]
        settings = {"temperature": 1.0 * (seed % 2), "seed": seed, "top_p": 1.0 if seed < 3 else 0.8}
        sampling = embedgrad.Sampling(max_new_tokens=most, **settings)  # type: ignore[arg-type]
        texts = [answer.text for answer in embedgrad.generate(model, prompt, [query] * n, sampling)]
        found.append(Case(chat(name, query, max_tokens=most, n=n, **settings), texts))
    return found


def _resident(pid: int) -> int:
    """A process' memory, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) >> 10


def _quiet(server: Running) -> bool:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if not server.gauge("embedgrad_answers_running") and not server.gauge("embedgrad_answers_waiting"):
            return True
        time.sleep(0.2)
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process' memory from /proc")
def test_a_storm_of_clients(tmp_path: Path) -> None:
    with running(tmp_path, "--slots", "16", "--max-waiting", "128") as server:
        cases = _cases(server)
        endless = {str(i): -1e9 for i in range(3)}
        long = chat("bare", "go on", max_tokens=1500, temperature=1.0, logit_bias=endless)
        resident = []
        for _ in range(ROUNDS):
            found = storm(server.address, cases, long, SECONDS, honest=48, hostile=16)
            assert not found.wrong, found.wrong[:3]
            assert found.right > 48
            assert found.disturbed > 16
            assert _quiet(server)
            resident.append(_resident(server.process.pid))
            assert httpx.get(f"{server.address}/health").json() == {"status": "ok"}
        assert resident[-1] <= 1.02 * resident[WARM] + 8, f"MiB after each round: {resident}"
