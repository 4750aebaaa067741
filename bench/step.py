"""How fast, and in how much memory, is one optimisation step against PEFT prompt tuning on transformers?

Forward and backward of one step on SmolLM2-135M-Instruct, float32, with the same ids and targets for both. Every
contender is a process of its own; the steps of all contenders take turns, so that a noisy machine is noisy for all.
Memory is the peak of the resident size during a step above its size once the model is loaded and has been used once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.worker import Worker, serve

SHAPES = {"64/64/8": (64, 64, 8), "200/50/8": (200, 50, 8), "32/250/8": (32, 250, 8)}
CONTENDERS = ("peft", "embedgrad", "embedgrad-layer")
TARGETS = 2  # answer tokens per example


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help="prompt/query/batch, default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="steps per contender that count (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--backend", default="auto", help="of embedgrad (default auto)")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, print a table, and return the rows."""
    if args.worker:
        _work(args.worker, args.backend, *(int(n) for n in args.shapes[0].split("/")))
        return []
    rows = []
    for shape in args.shapes:
        rows += _compare(shape, 2 if args.quick else args.repeats, args.threads, args.backend)
    return rows


def _compare(shape: str, repeats: int, threads: int, backend: str) -> list[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                Worker("step", "--worker", name, "--shapes", shape, "--backend", backend, threads=threads)
            )
            for name in CONTENDERS
        }
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        for _ in range(repeats + 1):  # the first step of each is not counted
            for name, worker in workers.items():
                results[name].append(worker.ask())
    rows = []
    for name, steps in results.items():
        seconds = sorted(step["seconds"] for step in steps[1:])
        rows.append(
            {
                "question": "step",
                "contender": name,
                "shape": shape,
                "threads": threads,
                "seconds_median": statistics.median(seconds),
                "seconds_min": seconds[0],
                "seconds_max": seconds[-1],
                "repeats": repeats,
                "peak_bytes": max(step["peak_bytes"] for step in steps),
                "loss": steps[-1]["loss"],
                "gradient_norm": steps[-1]["gradient_norm"],
                "version": steps[-1]["version"],
            }
        )
    _print(shape, rows)
    return rows


def _print(shape: str, rows: list[dict[str, Any]]) -> None:
    peft = next(row for row in rows if row["contender"] == "peft")
    print(
        f"\nprompt/query/batch {shape}, {TARGETS} targets each, {rows[0]['threads']} threads, "
        f"median of {rows[0]['repeats']}"
    )
    print(
        f"{'contender':<16} {'seconds':>8} {'min..max':>14} {'speed-up':>9} {'peak MB':>8} {'of PEFT':>8}  loss, |grad|"
    )
    for row in rows:
        print(
            f"{row['contender']:<16} {row['seconds_median']:8.2f} "
            f"{row['seconds_min']:6.2f}..{row['seconds_max']:<6.2f} "
            f"{peft['seconds_median'] / row['seconds_median']:8.2f}x {row['peak_bytes'] / 1e6:8.0f} "
            f"{row['peak_bytes'] / peft['peak_bytes']:8.2f}  {row['loss']:.6f}, {row['gradient_norm']:.6f}"
        )
    for row in rows:
        if abs(row["loss"] - peft["loss"]) > 1e-4 * abs(peft["loss"]):
            raise SystemExit(f"{row['contender']} computes another loss than PEFT at {shape}: no figure counts.")


def _work(name: str, backend: str, prompt: int, query: int, batch: int) -> None:
    """What a contender's process does: load, use once, then a step for every line on standard input."""
    if name == "peft":
        step, version = _peft(prompt, query, batch)
    else:
        step, version = _embedgrad(prompt, query, batch, "layer" if name.endswith("layer") else "all", backend)
    base: list[int] = []  # resident bytes before the first step

    def measure(_: dict[str, Any]) -> dict[str, Any]:
        if not base:
            base.append(_resident("VmRSS"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        started = time.perf_counter()
        loss, gradient_norm = step()
        seconds = time.perf_counter() - started
        figures = {"seconds": seconds, "loss": loss, "gradient_norm": gradient_norm, "version": version}
        return {**figures, "peak_bytes": _resident("VmHWM") - base[0]}

    serve({"ready": name}, measure)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _batch(vocabulary: int, prompt: int, query: int, batch: int) -> tuple[list[int], list[list[int]], list[list[int]]]:
    import random

    draw = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(100, vocabulary) for _ in range(n)]

    return tokens(prompt), [tokens(query) for _ in range(batch)], [tokens(TARGETS) for _ in range(batch)]


def _embedgrad(
    prompt: int, query: int, batch: int, policy: str, backend: str
) -> tuple[Callable[[], tuple[float, float]], str]:
    import embedgrad
    from embedgrad.tasks import smollm2

    model = embedgrad.load_model(smollm2.path(), backend=backend)
    ids, queries, targets = _batch(model.config.vocab_size, prompt, query, batch)
    soft = embedgrad.SoftPrompt.from_ids(model, ids, template=embedgrad.Template.plain())
    examples = [embedgrad.Example(q, t) for q, t in zip(queries, targets, strict=True)]
    embedgrad.score(
        model, soft.from_ids(model, ids[:4], template=embedgrad.Template.plain()), [embedgrad.Example(ids[:4], ids[:1])]
    )

    def step() -> tuple[float, float]:
        loss, grad = embedgrad.loss_and_grad(model, soft, examples, policy=policy)
        return loss, float(grad.norm())

    return step, f"embedgrad {embedgrad.__version__}, backend {model.backend}"


def _peft(prompt: int, query: int, batch: int) -> tuple[Callable[[], tuple[float, float]], str]:
    import peft
    import torch
    import transformers

    import embedgrad
    from bench.twin import transformers_twin
    from embedgrad.tasks import smollm2

    ours = embedgrad.load_model(smollm2.path())
    model = transformers_twin(ours, attention="sdpa")
    ids, queries, targets = _batch(ours.config.vocab_size, prompt, query, batch)
    start = ours.embedding_rows(ids)
    del ours
    tuned: Any = peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=prompt)
    )
    weight: Any = tuned.get_parameter("prompt_encoder.default.embedding.weight")
    weight.data.copy_(start)
    inputs = torch.tensor([q + t for q, t in zip(queries, targets, strict=True)])
    labels = torch.tensor([[-100] * query + t for t in targets])
    with torch.no_grad():
        tuned(input_ids=torch.tensor([ids[:8]]))

    def step() -> tuple[float, float]:
        tuned.zero_grad(set_to_none=True)
        loss = tuned(input_ids=inputs, labels=labels, attention_mask=torch.ones_like(inputs)).loss
        loss.backward()
        return float(loss.detach()), float(weight.grad.norm())

    return step, f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
