"""How fast are answers written behind one prompt: ours, llama.cpp and transformers, for 1, 8 and 32 queries?

All write greedily, from the same GGUF file or model folder (`--model`): ours from the weights as stored and in
float32, llama.cpp through `xllamacpp` with its prompt cache on and several numbers of slots (from GGUF files), and
`transformers.generate` on the dequantised weights. All are given the same tokens. Every contender is a process of its
own. They take turns, each time with new queries behind a prompt that they have seen. A rate is new tokens per second
of everything, prefill included. "First token" is the time of one query's first token, "alone" the rate of one query's
later tokens. The floor is the rate of one query if a token took only the time to read the stored bytes of layers and
head once, at the rate at which this machine reads memory in the same run. Memory is the resident size of a
contender's process after its answers, less what it had with torch alone.

Greedy texts part at the first near-tie, and the rest is another text. So every contender's tokens are judged by our
float32 logits behind the same beginning: how many are the likeliest token, and how far below it the worst other is. Of
llama.cpp a text is known; where it has more or fewer tokens than were written it is not judged.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import files, resident
from bench.harness.arguments import add_machine, positive
from bench.harness.clock import device, take_turns
from bench.harness.files import ModelFile
from bench.harness.markdown import table
from bench.harness.rows import Row, row
from bench.harness.worker import Worker, serve, workers
from bench.harness.writers import OURS, PROMPT_TOKENS, Query, renderer, writer

CONTENDERS = (*OURS, "transformers", "llama.cpp")
JUDGE = "embedgrad float32"
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
    files.add_argument(parser)
    parser.add_argument("--contenders", nargs="*", default=None, help=f"of {', '.join(CONTENDERS)} (default: all)")
    parser.add_argument("--queries", nargs="*", type=int, default=None, help="default: 1 8 32")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer (default 64)")
    parser.add_argument(
        "--repeats", type=positive, default=2, help="rounds that count (default 2; in float32 with 8 queries or more 1)"
    )
    add_machine(parser, of="of ours and of transformers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> list[Row]:
    """Measure; the rows."""
    device(args.device)
    if args.worker:
        _work(args.worker, args.path, args.threads, args.device)
        return []
    unknown = sorted(set(args.contenders or ()) - set(CONTENDERS))
    if unknown:
        raise SystemExit(f"--contenders {' '.join(unknown)}: they are {', '.join(CONTENDERS)}.")
    with files.model_files(args.model) as found:
        return [one for file in found for one in _of_file(file, args)]


def _of_file(file: ModelFile, args: argparse.Namespace) -> list[Row]:
    counts = args.queries or ([1, 8] if args.quick else [1, 8, 32])
    slots = sorted({n for count in counts for n in LLAMA_SLOTS.get(count, (count,))})
    names = [name for name in (*OURS, "transformers") if not args.contenders or name in args.contenders]
    if args.contenders and "llama.cpp" not in args.contenders:
        pass
    elif file.path.suffix != ".gguf":
        print(f"llama.cpp is left out: {file.title} is not a GGUF file.")
    elif importlib.util.find_spec("xllamacpp") is None:
        print("llama.cpp is left out: `pip install xllamacpp` brings it.")
    else:
        names += [f"llama.cpp {n}" for n in slots]
    rows = []
    options = ("--device", args.device, "--threads", str(args.threads), "--path", str(file.path))
    with workers("decode", {name: ("--worker", name, *options) for name in names}, args.threads) as running:
        print(f"{file.title} ({file.types})", flush=True)
        render = renderer(file.path)
        for count in counts:
            rows += _rounds(running, file, render, count, 2 if args.quick else args.repeats, args)
    return [*rows, _floor(file, args.threads, device(args.device))]


def _takes_part(name: str, count: int) -> bool:
    return not name.startswith("llama.cpp") or int(name.split()[1]) in LLAMA_SLOTS.get(count, (count,))


def _rounds(
    running: dict[str, Worker],
    file: ModelFile,
    render: Callable[[str], Query],
    count: int,
    repeats: int,
    args: argparse.Namespace,
) -> list[Row]:
    def asked(number: int) -> dict[str, Any]:
        texts = _queries(count, number)
        first = [texts[0].replace("about", "about the")] if count == 1 else []
        return {"queries": [vars(render(text)) for text in texts], "first": [vars(render(text)) for text in first]}

    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number in range(repeats + 1):  # the first round is short and not counted
        for name, worker in running.items():
            wide = "float32" in name or name == "transformers"
            if _takes_part(name, count) and not (wide and count >= MANY and 0 < number < repeats):
                wanted = args.tokens if number else WARM_TOKENS
                answers[name].append(worker.ask(**asked(number), tokens=wanted))
    judge = running.get(JUDGE)
    rows = []
    for name, found in answers.items():
        counted = found[1:]
        more: dict[str, Any] = {"likeliest": None, "largest_gap": None}
        if judge is not None:
            queries, written = asked(repeats)["queries"][:JUDGED], counted[-1]["answers"][:JUDGED]
            gaps = judge.ask(queries=queries, judge=written)["gaps"]
            if gaps:
                more = {"likeliest": sum(gap <= 0 for gap in gaps) / len(gaps), "largest_gap": max(gaps)}
        more["process_bytes"], more["torch_bytes"] = counted[-1]["process_bytes"], running[name].ready["torch_bytes"]
        for key in ("first_token_seconds", "alone"):
            values = [answer[key] for answer in counted if answer.get(key)]
            more[key] = statistics.median(values) if values else None
        rates = [answer["tokens"] / answer["seconds"] for answer in counted]
        case = {"model": file.title, "types": file.types, "queries": count, "tokens": args.tokens,
                "prompt": PROMPT_TOKENS, "threads": args.threads, "device": args.device}  # fmt: skip
        rows.append(row("decode", name, running[name].ready["version"], rates, case=case, unit="tokens/s", **more))
    print(f"{count} queries: " + ", ".join(f"{r.contender} {r.median:.0f} tokens/s" for r in rows), flush=True)
    return rows


def _queries(count: int, number: int) -> list[str]:
    """Queries of a round, which no earlier round has had."""
    return [
        f"Tell me about {SUBJECTS[i % len(SUBJECTS)]} {1000 * number + 7 * i + count} and where it comes from."
        for i in range(count)
    ]


def _floor(file: ModelFile, threads: int, where: torch.device) -> Row:
    """The bytes that the device reads per second, and the rate that the stored bytes allow."""
    from embedgrad.engine.model import load_model

    torch.set_num_threads(threads)
    weights = load_model(file.path, weights="stored").weights
    stored = sum(x.nbytes for layer in weights.layers for x in layer.tensors())
    stored += sum(x.nbytes for x in weights.head.tensors())
    data = torch.ones(1 << 27, device=where)
    rates = [data.nbytes / seconds for seconds in take_turns([data.sum], 7, where)[0]]
    return row(
        "decode", "byte floor", f"torch {torch.__version__}", [rate / stored for rate in rates],
        case={"model": file.title, "types": file.types, "queries": 1, "threads": threads, "device": where.type},
        unit="tokens/s",
        stored_bytes=stored, bytes_per_second=statistics.median(rates),
    )  # fmt: skip


# ---- the contenders' side --------------------------------------------------------------------------------------------


def _work(name: str, path: Path, threads: int, device: str) -> None:
    torch_bytes = resident.resident()  # before anything else is imported
    contender = writer(name, path, threads, device)
    write = contender.write

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        queries = [Query(**query) for query in request["queries"]]
        if "judge" in request:
            assert contender.judge is not None
            return {"gaps": contender.judge(queries, request["judge"])}
        tokens = request["tokens"]
        result: dict[str, Any] = {}
        if request["first"]:
            started = time.perf_counter()
            write([Query(**query) for query in request["first"]], 1)
            result["first_token_seconds"] = time.perf_counter() - started
        started = time.perf_counter()
        answers, written = write(queries, tokens)
        seconds = time.perf_counter() - started
        if len(queries) == 1 and written > 1:
            result["alone"] = (written - 1) / max(seconds - result["first_token_seconds"], 1e-9)
        held = resident.resident()
        return {**result, "seconds": seconds, "tokens": written, "answers": answers, "process_bytes": held}

    serve({"version": contender.version, "torch_bytes": torch_bytes}, measure)


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
    """`decode`: for every file rates, times to the first token, and whether the tokens are the likeliest."""
    heads = ("queries", "", "tokens/s", "20..80 %", "of llama.cpp's best", "alone", "first token", "likeliest token",
             "farthest below it", "memory, MB")  # fmt: skip
    parts = []
    for title, of_model in files.by_model(rows).items():
        cells: list[Sequence[object]] = []
        for count, group in _by_queries(of_model).items():
            best = _best_llama(group)
            cells += [_cells(one, count if number == 0 else None, best) for number, one in enumerate(group)]
        parts += [f"**{title}**", table(heads, cells), *_floor_notes(of_model)]
    return {"decode": "\n\n".join(parts)}


def _cells(one: Row, count: int | None, best: float | None) -> Sequence[object]:
    more = one.more
    first, alone, likeliest = more["first_token_seconds"], more["alone"], more["likeliest"]
    held = more["process_bytes"] - more["torch_bytes"] if "process_bytes" in more else None
    return (
        count, _name(one.contender), f"{one.median:.0f}", f"{one.low:.0f}..{one.high:.0f}",
        f"{one.median / best:.2f}×" if best else None, f"{alone:.0f}" if alone else None,
        f"{first * 1e3:.0f} ms" if first else None, None if likeliest is None else f"{likeliest:.1%}",
        None if likeliest is None else f"{more['largest_gap']:.2f}", held and f"{held / 1e6:.0f}",
    )  # fmt: skip


def _floor_notes(rows: Sequence[Row]) -> list[str]:
    ours = [one.more["alone"] for one in rows if one.contender == OURS[0] and one.more.get("alone")]
    notes = []
    for one in rows:
        if one.contender == "byte floor":
            share = f" Ours writes {ours[0] / one.median:.0%} of that alone." if ours else ""
            notes.append(
                f"Reading the {one.more['stored_bytes'] / 1e6:.0f} MB of stored weights once per token, at the "
                f"{one.more['bytes_per_second'] / 1e9:.1f} GB/s of the same run, would allow {one.median:.0f} tokens/s "
                f"to one query.{share}"
            )
    return notes


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """Rates by number of queries."""
    import matplotlib.pyplot as plt

    from bench.harness import pictures as draw

    models = files.by_model(rows)
    most = max(len(_by_queries(group)) for group in models.values())
    figure, panels = plt.subplots(len(models), most, figsize=(3 * most, 3.4 * len(models)), squeeze=False)
    for line, (title, of_model) in zip(panels, models.items(), strict=True):
        floors = [one.median for one in of_model if one.contender == "byte floor"]
        line[0].set_ylabel(f"{title.split(' ')[0]}\nnew tokens per second", fontsize=8)
        for axes, (count, group) in zip(line, _by_queries(of_model).items(), strict=False):
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
    return {"decode": figure}
