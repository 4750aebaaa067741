"""How fast are answers written behind one prompt: ours, llama.cpp and transformers, for 1, 8 and 32 queries?

SmolLM2-135M-Instruct, greedy, all from the same Q4_1 file: ours from the blocks as stored and in float32, llama.cpp
through `xllamacpp` with its prompt cache on and several numbers of slots, `transformers.generate` on the dequantised
weights. Every contender is a process of its own and they take turns, each time with queries that it has not seen,
behind a prompt that it has. A rate is new tokens per second of everything, prefill included; "first token" is the time
of one query's first token, and "alone" the rate of one query's later tokens. Beside them stands what reading the stored
bytes once per token would allow, at the rate at which this machine reads memory in the same run.

Greedy texts part at the first near-tie, and what follows is another text. So every contender's tokens are judged by
our float32 logits behind the same beginning: how many are the likeliest one, and how far below it the worst other is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.markdown import table
from bench.rows import Row, row
from bench.worker import Worker, serve

LLAMA_SLOTS = {1: (1,), 8: (8,), 32: (8, 32)}  # tried for so many queries; others: as many slots as queries
SYSTEM = "You are a helpful assistant that explains things to people in plain words and short sentences. "
PROMPT_TOKENS = 190
MANY = 8  # queries, of which what computes in float32 does the last round only
WARM_TOKENS = 4  # of the round that does not count
JUDGED = 8  # answers of each contender whose tokens are judged
CONTEXT = 512  # tokens of a sequence that llama.cpp keeps room for
SUBJECTS = ("number", "letter", "colour", "river", "planet", "tool", "animal", "song", "city", "plant", "game", "metal")
OURS = ("embedgrad stored", "embedgrad float32")
CHECKS = (
    "tests/engine/test_generation_loop.py::test_an_answer_does_not_depend_on_its_neighbours_or_threads",
    "tests/engine/test_generation_loop.py::test_both_loops_write_the_same",
)

Judge = Callable[[Sequence[str], Sequence[str]], list[float]]  # queries, texts → how far tokens are from the likeliest
Write = Callable[[Sequence[str], int], tuple[list[str], int]]  # queries, new tokens → texts, tokens written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--queries", nargs="*", type=int, default=None, help="default: 1 8 32")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer (default 64)")
    parser.add_argument(
        "--repeats", type=int, default=2, help="rounds that count (default 2; in float32 with 8 queries or more 1)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of ours and of transformers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> list[Row]:
    """Measure; the rows."""
    from bench.clock import device

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
    with contextlib.ExitStack() as stack:
        options = ("--device", args.device)
        workers = {
            name: stack.enter_context(Worker("decode", "--worker", name, *options, threads=args.threads))
            for name in names
        }
        for count in counts:
            rows += _rounds(workers, count, args.tokens, 2 if args.quick else args.repeats, args)
    return [*rows, _floor(args.threads)]


def _takes_part(name: str, count: int) -> bool:
    return not name.startswith("llama.cpp") or int(name.split()[1]) in LLAMA_SLOTS.get(count, (count,))


def _rounds(workers: dict[str, Worker], count: int, tokens: int, repeats: int, args: argparse.Namespace) -> list[Row]:
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number in range(repeats + 1):  # the first round is short and not counted
        for name, worker in workers.items():
            slow = "float32" in name or name == "transformers"
            slow = slow and count >= MANY and 0 < number < repeats
            if _takes_part(name, count) and not slow:
                wanted = tokens if number else WARM_TOKENS
                answers[name].append(worker.ask(queries=_queries(count, number), tokens=wanted))
    judge = workers["embedgrad float32"]
    rows = []
    for name, found in answers.items():
        counted = found[1:]
        gaps = judge.ask(queries=_queries(count, repeats)[:JUDGED], judge=counted[-1]["texts"][:JUDGED])["gaps"]
        more: dict[str, Any] = {"likeliest": sum(gap <= 0 for gap in gaps) / len(gaps), "largest_gap": max(gaps)}
        for key in ("first_token_seconds", "alone"):
            values = [answer[key] for answer in counted if answer.get(key)]
            more[key] = statistics.median(values) if values else None
        rates = [answer["tokens"] / answer["seconds"] for answer in counted]
        case = {"queries": count, "tokens": tokens, "prompt": PROMPT_TOKENS, "threads": args.threads,
                "device": args.device}  # fmt: skip
        rows.append(row("decode", name, workers[name].ready["version"], rates, case=case, unit="tokens/s", **more))
    print(f"{count} queries: " + ", ".join(f"{r.contender} {r.median:.0f} tokens/s" for r in rows), flush=True)
    return rows


def _queries(count: int, number: int) -> list[str]:
    """Queries that no earlier round has had."""
    return [
        f"Tell me about {SUBJECTS[i % len(SUBJECTS)]} {1000 * number + 7 * i + count} and where it comes from."
        for i in range(count)
    ]


def _floor(threads: int) -> Row:
    """What the machine reads per second, and the tokens that the stored bytes allow."""
    import torch

    from bench.clock import take_turns
    from embedgrad.model.model import load_model
    from embedgrad.tasks import smollm2

    torch.set_num_threads(threads)
    model = load_model(smollm2.path(), weights="stored")
    stored = sum(x.nbytes for x in model.weights.tensors())
    data = torch.ones(1 << 27)
    rates = [data.nbytes / seconds for seconds in take_turns([data.sum], 7, torch.device("cpu"))[0]]
    return row(
        "decode", "byte floor", f"torch {torch.__version__}", [rate / stored for rate in rates],
        case={"queries": 1, "threads": threads, "device": "cpu"}, unit="tokens/s",
        stored_bytes=stored, bytes_per_second=statistics.median(rates),
    )  # fmt: skip


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
    """`decode`: rates, times to the first token, and how likely the tokens are."""
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

    from bench import style

    groups = _by_queries(rows)
    figure, panels = plt.subplots(1, len(groups), figsize=(3 * len(groups), 3.4), squeeze=False)
    floors = [one.median for one in rows if one.contender == "byte floor"]
    for axes, (count, group) in zip(panels[0], groups.items(), strict=True):
        names = [_name(one.contender).replace(", ", ",\n") for one in group]
        bars = axes.bar(range(len(group)), [one.median for one in group],
                        color=[style.colour(one.contender) for one in group])  # fmt: skip
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
        axes.set_xticks(range(len(group)), names, rotation=60, ha="right", fontsize=7)
        axes.set_title(f"{count} quer{'y' if count == 1 else 'ies'}", fontsize=10)
        axes.grid(axis="x", visible=False)
        if count == 1 and floors:
            axes.axhline(floors[0], color=style.LIMIT, linestyle="--")
            place = (len(group) - 0.5, floors[0])
            axes.annotate("bytes read once per token", place, ha="right", va="bottom", fontsize=7)
    panels[0][0].set_ylabel("new tokens per second")
    return {"decode": figure}


# ---- the contenders' side --------------------------------------------------------------------------------------------


def _work(name: str, threads: int, device: str) -> None:
    judge: Judge | None = None
    if name.startswith("llama.cpp"):
        write, version = _llama(int(name.split()[1]), threads)
    elif name == "transformers":
        write, version = _transformers(device)
    else:
        write, judge, version = _embedgrad("stored" if name.endswith("stored") else "compute", device)
    write(["What is a name?"], 4)  # used once

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        if "judge" in request:
            assert judge is not None
            return {"gaps": judge(request["queries"], request["judge"])}
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

    serve({"version": version}, measure)


def _system(tokenizer: Any) -> str:
    """The prompt's text, of PROMPT_TOKENS tokens."""
    ids = tokenizer.encode(SYSTEM * 40)[:PROMPT_TOKENS]
    return tokenizer.decode(ids)


def _embedgrad(weights: str, device: str) -> tuple[Write, Judge, str]:
    import torch

    import embedgrad
    from embedgrad.prefill import own_contexts, shared_context
    from embedgrad.rendering import render_query
    from embedgrad.tasks import smollm2

    model = embedgrad.load_model(smollm2.path(), weights=weights, device=device)
    prompt = embedgrad.SoftPrompt.from_text(model, _system(model.tokenizer))

    def write(queries: Sequence[str], tokens: int) -> tuple[list[str], int]:
        answers = embedgrad.generate(model, prompt, queries, embedgrad.Sampling(max_new_tokens=tokens))
        return [a.text for a in answers], sum(len(a.log_probabilities) for a in answers)

    def judge(queries: Sequence[str], texts: Sequence[str]) -> list[float]:
        gaps = []
        for query, text in zip(queries, texts, strict=True):
            context = render_query(model, prompt, query)
            trunk = shared_context(model, prompt.embeddings, context, len(context.ids) - 1)
            cache, logits = own_contexts(model, prompt.embeddings, [context], trunk)
            for token in model.tokenizer.encode(text)[:-1]:  # a text that was cut may end within a token
                gaps.append(float(logits.max() - logits[0, token]))
                logits = cache.next_logits(torch.tensor([token], device=model.device))
        return gaps

    return write, judge, f"embedgrad {embedgrad.__version__}, backend {model.backend}"


def _conversation(system: str, query: str) -> str:
    """SmolLM2's chat template."""
    turns = (("system", system), ("user", query))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def _llama(slots: int, threads: int) -> tuple[Write, str]:
    import xllamacpp

    from embedgrad.model.model import load_model
    from embedgrad.tasks import smollm2

    system = _system(load_model(smollm2.path(), weights="stored").tokenizer)
    params = xllamacpp.CommonParams()
    params.model.path = str(smollm2.path())
    params.n_parallel, params.n_ctx, params.cache_prompt, params.verbosity = slots, slots * CONTEXT, True, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def one(query: str, tokens: int) -> tuple[str, int]:
        request = {"prompt": _conversation(system, query), "n_predict": tokens, "temperature": 0.0}
        answer = server.handle_completions({**request, "cache_prompt": True})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

    def write(queries: Sequence[str], tokens: int) -> tuple[list[str], int]:
        with ThreadPoolExecutor(len(queries)) as pool:
            answers = list(pool.map(lambda query: one(query, tokens), queries))
        return [text for text, _ in answers], sum(count for _, count in answers)

    write([f"What is {i}?" for i in range(slots)], 4)  # the prompt is in every slot's cache
    return write, f"xllamacpp {importlib.metadata.version('xllamacpp')}"


def _transformers(device: str) -> tuple[Write, str]:
    import torch
    import transformers

    import embedgrad
    from embedgrad.compare.twin import transformers_twin
    from embedgrad.tasks import smollm2

    ours = embedgrad.load_model(smollm2.path(), device=device)
    tokenizer, system = ours.tokenizer, _system(ours.tokenizer)
    model: Any = transformers_twin(ours, attention="sdpa")
    eos = sorted(tokenizer.eos_ids)

    def write(queries: Sequence[str], tokens: int) -> tuple[list[str], int]:
        contexts = [tokenizer.encode(_conversation(system, query)) for query in queries]
        longest = max(map(len, contexts))
        padding = [longest - len(context) for context in contexts]
        padded = [[eos[0]] * n + context for n, context in zip(padding, contexts, strict=True)]
        ids = torch.tensor(padded, device=device)
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos[0]
            )[:, longest:].tolist()
        answers = []
        for written in out:
            end = next((i for i, token in enumerate(written) if token in eos), len(written))
            answers.append((tokenizer.decode(written[:end]), min(end + 1, len(written))))
        return [text for text, _ in answers], sum(count for _, count in answers)

    return write, f"transformers {transformers.__version__}, torch {torch.__version__}"
