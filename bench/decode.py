"""How fast are answers written behind one prompt: ours, llama.cpp and transformers, for 1, 8 and 32 queries?

SmolLM2-135M-Instruct, greedy, all from the same Q4_1 file: ours from the blocks as stored and in float32, llama.cpp
through `xllamacpp` with its prompt cache on and several numbers of slots, `transformers.generate` on the dequantised
weights. Every contender is a process of its own. They take turns, each time with new queries behind a prompt that they
have seen. A rate is new tokens per second of everything, prefill included. "First token" is the time of one query's
first token, "alone" the rate of one query's later tokens. The floor is the rate of one query if a token took only the
time to read the stored bytes once, at the rate at which this machine reads memory in the same run.

Greedy texts part at the first near-tie, and the rest is another text. So every contender's tokens are judged by our
float32 logits behind the same beginning: how many are the likeliest token, and how far below it the worst other is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from bench.harness.arguments import positive
from bench.harness.clock import device, take_turns
from bench.harness.markdown import table
from bench.harness.rows import Row, row
from bench.harness.worker import Worker, serve, workers
from bench.harness.writers import OURS, PROMPT_TOKENS, writer

LLAMA_SLOTS = {1: (1,), 8: (8,), 32: (8, 32)}  # tried for so many queries; for others, as many slots as queries
MANY = 8  # with so many queries or more, what computes in float32 takes part in the last round only
WARM_TOKENS = 4  # of the round that does not count
JUDGED = 8  # answers of each contender whose tokens are judged
SUBJECTS = ("number", "letter", "colour", "river", "planet", "tool", "animal", "song", "city", "plant", "game", "metal")
CHECKS = (
    "tests/generation/test_loops.py::test_an_answer_does_not_depend_on_its_neighbours_or_threads",
    "tests/generation/test_loops.py::test_both_loops_write_the_same",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    parser.add_argument("--queries", nargs="*", type=int, default=None, help="default: 1 8 32")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer (default 64)")
    parser.add_argument(
        "--repeats", type=positive, default=2, help="rounds that count (default 2; in float32 with 8 queries or more 1)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of ours and of transformers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> list[Row]:
    """Measure; the rows."""
    device(args.device)
    if args.worker:
        _work(args.worker, args.threads, args.device)
        return []
    counts = args.queries or ([1, 8] if args.quick else [1, 8, 32])
    slots = sorted({n for count in counts for n in LLAMA_SLOTS.get(count, (count,))})
    names = [*OURS, "transformers"]
    if importlib.util.find_spec("xllamacpp") is None:
        print("llama.cpp is left out: `pip install xllamacpp` brings it.")
    else:
        names += [f"llama.cpp {n}" for n in slots]
    rows = []
    options = ("--device", args.device, "--threads", str(args.threads))
    with workers("decode", {name: ("--worker", name, *options) for name in names}, args.threads) as running:
        for count in counts:
            rows += _rounds(running, count, 2 if args.quick else args.repeats, args)
    return [*rows, _floor(args.threads, device(args.device))]


def _takes_part(name: str, count: int) -> bool:
    return not name.startswith("llama.cpp") or int(name.split()[1]) in LLAMA_SLOTS.get(count, (count,))


def _rounds(running: dict[str, Worker], count: int, repeats: int, args: argparse.Namespace) -> list[Row]:
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number in range(repeats + 1):  # the first round is short and not counted
        for name, worker in running.items():
            wide = "float32" in name or name == "transformers"
            if _takes_part(name, count) and not (wide and count >= MANY and 0 < number < repeats):
                wanted = args.tokens if number else WARM_TOKENS
                answers[name].append(worker.ask(queries=_queries(count, number), tokens=wanted))
    judge = running["embedgrad float32"]
    rows = []
    for name, found in answers.items():
        counted = found[1:]
        gaps = judge.ask(queries=_queries(count, repeats)[:JUDGED], judge=counted[-1]["texts"][:JUDGED])["gaps"]
        more: dict[str, Any] = {"likeliest": sum(gap <= 0 for gap in gaps) / len(gaps), "largest_gap": max(gaps)}
        for key in ("first_token_seconds", "alone"):
            values = [answer[key] for answer in counted if answer.get(key)]
            more[key] = statistics.median(values) if values else None
        rates = [answer["tokens"] / answer["seconds"] for answer in counted]
        case = {"queries": count, "tokens": args.tokens, "prompt": PROMPT_TOKENS, "threads": args.threads,
                "device": args.device}  # fmt: skip
        rows.append(row("decode", name, running[name].ready["version"], rates, case=case, unit="tokens/s", **more))
    print(f"{count} queries: " + ", ".join(f"{r.contender} {r.median:.0f} tokens/s" for r in rows), flush=True)
    return rows


def _queries(count: int, number: int) -> list[str]:
    """Queries of a round, which no earlier round has had."""
    return [
        f"Tell me about {SUBJECTS[i % len(SUBJECTS)]} {1000 * number + 7 * i + count} and where it comes from."
        for i in range(count)
    ]


def _floor(threads: int, where: torch.device) -> Row:
    """The bytes that the device reads per second, and the rate that the stored bytes allow."""
    from embedgrad.engine.model import load_model
    from embedgrad.tasks import smollm2

    torch.set_num_threads(threads)
    model = load_model(smollm2.path(), weights="stored")
    stored = sum(x.nbytes for x in model.weights.tensors())
    data = torch.ones(1 << 27, device=where)
    rates = [data.nbytes / seconds for seconds in take_turns([data.sum], 7, where)[0]]
    return row(
        "decode", "byte floor", f"torch {torch.__version__}", [rate / stored for rate in rates],
        case={"queries": 1, "threads": threads, "device": where.type}, unit="tokens/s",
        stored_bytes=stored, bytes_per_second=statistics.median(rates),
    )  # fmt: skip


# ---- the contenders' side --------------------------------------------------------------------------------------------


def _work(name: str, threads: int, device: str) -> None:
    contender = writer(name, threads, device)
    write = contender.write
    write(["What is a name?"], 4)  # the first call does what is done once

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        if "judge" in request:
            assert contender.judge is not None
            return {"gaps": contender.judge(request["queries"], request["judge"])}
        queries, tokens = request["queries"], request["tokens"]
        result: dict[str, Any] = {}
        if len(queries) == 1:
            started = time.perf_counter()
            write([queries[0].replace("about", "about the")], 1)
            result["first_token_seconds"] = time.perf_counter() - started
        started = time.perf_counter()
        texts, written = write(queries, tokens)
        seconds = time.perf_counter() - started
        if len(queries) == 1 and written > 1:
            result["alone"] = (written - 1) / max(seconds - result["first_token_seconds"], 1e-9)
        return {**result, "seconds": seconds, "tokens": written, "texts": texts}

    serve({"version": contender.version}, measure)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _name(contender: str) -> str:
    if contender.startswith("llama.cpp"):
        slots = int(contender.split()[1])
        return f"llama.cpp, {slots} slot{'s' if slots > 1 else ''}"
    return {"embedgrad stored": "embedgrad, blocks as stored", "embedgrad float32": "embedgrad, float32"}.get(
        contender, "transformers, float32"
    )


def _by_queries(rows: Sequence[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = defaultdict(list)
    for one in rows:
        if one.contender != "byte floor":
            found[int(one.case["queries"])].append(one)
    return found


def _best_llama(rows: Sequence[Row]) -> float | None:
    return max((r.median for r in rows if r.contender.startswith("llama.cpp")), default=None)


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`decode`: rates, times to the first token, and whether the tokens are the likeliest."""
    heads = ("queries", "", "tokens/s", "20..80 %", "of llama.cpp's best", "alone", "first token", "likeliest token",
             "farthest below it")  # fmt: skip
    cells: list[Sequence[object]] = []
    for count, group in _by_queries(rows).items():
        best = _best_llama(group)
        for number, one in enumerate(group):
            first, alone = one.more["first_token_seconds"], one.more["alone"]
            cells.append((
                None if number else count, _name(one.contender), f"{one.median:.0f}", f"{one.low:.0f}..{one.high:.0f}",
                f"{one.median / best:.2f}×" if best else None, f"{alone:.0f}" if alone else None,
                f"{first * 1e3:.0f} ms" if first else None, f"{one.more['likeliest']:.1%}",
                f"{one.more['largest_gap']:.2f}",
            ))  # fmt: skip
    notes = [
        f"Reading the {one.more['stored_bytes'] / 1e6:.0f} MB of stored weights once per token, at the "
        f"{one.more['bytes_per_second'] / 1e9:.1f} GB/s of the same run, would allow {one.median:.0f} tokens/s to one "
        "query."
        for one in rows
        if one.contender == "byte floor"
    ]
    return {"decode": "\n\n".join([table(heads, cells), *notes])}


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """Rates by number of queries."""
    import matplotlib.pyplot as plt

    from bench.harness import pictures as draw

    groups = _by_queries(rows)
    figure, panels = plt.subplots(1, len(groups), figsize=(3 * len(groups), 3.4), squeeze=False)
    floors = [one.median for one in rows if one.contender == "byte floor"]
    for axes, (count, group) in zip(panels[0], groups.items(), strict=True):
        names = [_name(one.contender).replace(", ", ",\n") for one in group]
        bars = axes.bar(range(len(group)), [one.median for one in group],
                        color=[draw.colour(one.contender) for one in group])  # fmt: skip
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
        axes.set_xticks(range(len(group)), names, rotation=60, ha="right", fontsize=7)
        axes.set_title(f"{count} quer{'y' if count == 1 else 'ies'}", fontsize=10)
        axes.grid(axis="x", visible=False)
        if count == 1 and floors:
            axes.axhline(floors[0], color=draw.LIMIT, linestyle="--")
            place = (len(group) - 0.5, floors[0])
            axes.annotate("bytes read once per token", place, ha="right", va="bottom", fontsize=7)
    panels[0][0].set_ylabel("new tokens per second")
    return {"decode": figure}
