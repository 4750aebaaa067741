"""How fast, and in how much memory, is one optimisation step against PEFT prompt tuning on transformers?

Forward and backward of one step on SmolLM2-135M-Instruct, float32, with the same ids and targets for both. Every
contender is a process of its own; the steps of all contenders take turns, so that a noisy machine is noisy for all.
Memory is the peak of the resident size during a step above its size once the model is loaded and has been used once,
and beside it that of the whole process. The floor (`bench/floor.py`) is what BLAS needs for the step's necessary
operations, measured in the same turns.
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
CONTENDERS = ("floor", "peft", "embedgrad", "embedgrad-layer", "embedgrad-stored")
OURS = {
    "embedgrad": ("all", "compute"),
    "embedgrad-layer": ("layer", "compute"),
    "embedgrad-stored": ("layer", "stored"),
}
"""Memory policy and weights of each of ours."""
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
    floor = statistics.median(step["seconds"] for step in results.pop("floor")[1:])
    rows = []
    for name, steps in results.items():
        seconds = sorted(step["seconds"] for step in steps[1:])
        median = statistics.median(seconds)
        rows.append(
            {
                "question": "step",
                "contender": name,
                "shape": shape,
                "threads": threads,
                "seconds_median": median,
                "seconds_min": seconds[0],
                "seconds_max": seconds[-1],
                "repeats": repeats,
                "floor_seconds": floor,
                "of_floor": floor / median,
                **{key: max(step[key] for step in steps) for key in ("peak_bytes", "process_bytes", "torch_bytes")},
                **{key: steps[-1][key] for key in ("loss", "gradient_norm", "version")},
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
        f"{'contender':<16} {'seconds':>8} {'min..max':>14} {'speed-up':>9} {'of floor':>8} {'peak MB':>8} "
        f"{'of PEFT':>8} {'process MB':>10}  loss, |grad|"
    )
    for row in rows:
        print(
            f"{row['contender']:<16} {row['seconds_median']:8.2f} "
            f"{row['seconds_min']:6.2f}..{row['seconds_max']:<6.2f} "
            f"{peft['seconds_median'] / row['seconds_median']:8.2f}x {row['of_floor']:8.0%} "
            f"{row['peak_bytes'] / 1e6:8.0f} {row['peak_bytes'] / peft['peak_bytes']:8.3f} "
            f"{row['process_bytes'] / 1e6:10.0f}  {row['loss']:.6f}, {row['gradient_norm']:.6f}"
        )
    print(f"floor {rows[0]['floor_seconds']:.2f} s; a process that has imported torch: {_torch(rows) / 1e6:.0f} MB")
    for row in rows:
        if abs(row["loss"] - peft["loss"]) > 1e-4 * abs(peft["loss"]):
            raise SystemExit(f"{row['contender']} computes another loss than PEFT at {shape}: no figure counts.")


def _torch(rows: list[dict[str, Any]]) -> float:
    return statistics.median(row["torch_bytes"] for row in rows)


def _work(name: str, backend: str, prompt: int, query: int, batch: int) -> None:
    """What a contender's process does: load, use once, then a step for every line on standard input."""
    import torch  # noqa: F401 (what it takes is a figure of its own)

    torch_bytes = _resident("VmRSS")
    if name == "floor":
        return _serve_floor(prompt, query, batch)
    if name == "peft":
        step, version = _peft(prompt, query, batch)
    else:
        step, version = _embedgrad(prompt, query, batch, *OURS[name], backend)
    base: list[int] = []  # resident bytes before the first step

    def measure(_: dict[str, Any]) -> dict[str, Any]:
        if not base:
            base.append(_resident("VmRSS"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        started = time.perf_counter()
        loss, gradient_norm = step()
        seconds = time.perf_counter() - started
        figures = {"seconds": seconds, "loss": loss, "gradient_norm": gradient_norm, "version": version}
        peak = _resident("VmHWM")
        return {**figures, "peak_bytes": peak - base[0], "process_bytes": peak, "torch_bytes": torch_bytes}

    serve({"ready": name}, measure)


def _serve_floor(prompt: int, query: int, batch: int) -> None:
    import embedgrad
    from bench.floor import seconds
    from embedgrad.rendering import render
    from embedgrad.tasks import smollm2
    from embedgrad.tree import build_tree

    model = embedgrad.load_model(smollm2.path(), weights="stored")
    soft, examples = _task(model, prompt, query, batch)
    tree = build_tree([render(model, soft, example) for example in examples])
    serve({"ready": "floor"}, lambda _: {"seconds": seconds(model.config, tree)})


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


def _task(model: Any, prompt: int, query: int, batch: int) -> tuple[Any, list[Any]]:
    """A prompt and examples of random tokens."""
    import embedgrad

    ids, queries, targets = _batch(model.config.vocab_size, prompt, query, batch)
    soft = embedgrad.SoftPrompt.from_ids(model, ids, template=embedgrad.Template.plain())
    return soft, [embedgrad.Example(q, t) for q, t in zip(queries, targets, strict=True)]


def _embedgrad(
    prompt: int, query: int, batch: int, policy: str, weights: str, backend: str
) -> tuple[Callable[[], tuple[float, float]], str]:
    import embedgrad
    from embedgrad.tasks import smollm2

    model = embedgrad.load_model(smollm2.path(), backend=backend, weights=weights)
    soft, examples = _task(model, prompt, query, batch)
    short, _ = _task(model, 4, 4, 1)
    embedgrad.score(model, short, [embedgrad.Example([100, 101, 102], [103])])  # used once

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
