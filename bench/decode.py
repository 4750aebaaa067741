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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.worker import Worker, serve

LLAMA_SLOTS = (1, 8, 16, 32)
SYSTEM = "You are a helpful assistant that explains things to people in plain words and short sentences. "
PROMPT_TOKENS = 190
JUDGED = 8  # answers of each contender whose tokens are judged
CONTEXT = 512  # tokens of a sequence that llama.cpp keeps room for
SUBJECTS = ("number", "letter", "colour", "river", "planet", "tool", "animal", "song", "city", "plant", "game", "metal")

Judge = Callable[[Sequence[str], Sequence[str]], list[float]]  # queries, texts → how far tokens are from the likeliest
Write = Callable[[Sequence[str], int], tuple[list[str], int]]  # queries, new tokens → texts, tokens written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--queries", nargs="*", type=int, default=[1, 8, 32], help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer (default 64)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, print a table, and return the rows."""
    if args.worker:
        _work(args.worker, args.threads)
        return []
    repeats = 2 if args.quick else args.repeats
    names = ["embedgrad stored", "embedgrad float32", "transformers"]
    if importlib.util.find_spec("xllamacpp"):
        names += [f"llama.cpp {slots}" for slots in LLAMA_SLOTS if slots <= max(args.queries)]
    else:
        print("llama.cpp is left out: `pip install xllamacpp` brings it.")
    rows = []
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker("decode", "--worker", name, threads=args.threads)) for name in names
        }
        for count in args.queries:
            rows += _rounds(workers, count, args.tokens, repeats, args.threads)
    rows.append(_floor(args.threads))
    _print(rows, max(args.queries))
    return rows


def _rounds(workers: dict[str, Worker], count: int, tokens: int, repeats: int, threads: int) -> list[dict[str, Any]]:
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for number in range(repeats + 1):  # the first round is not counted
        for name, worker in workers.items():
            if not name.startswith("llama.cpp") or int(name.split()[1]) <= count:
                answers[name].append(worker.ask(queries=_queries(count, number), tokens=tokens))
    judge = workers["embedgrad float32"]
    rows = []
    for name, found in answers.items():
        if not found:
            continue
        counted = found[1:]
        rates = sorted(answer["tokens"] / answer["seconds"] for answer in counted)
        row = {
            "question": "decode", "contender": name, "version": workers[name].ready["version"], "queries": count,
            "threads": threads, "repeats": repeats, "tokens_per_second": statistics.median(rates),
            "tokens_per_second_20": rates[len(rates) // 5], "tokens_per_second_80": rates[-1 - len(rates) // 5],
        }  # fmt: skip
        asked, texts = _queries(count, repeats)[:JUDGED], counted[-1]["texts"][:JUDGED]
        gaps = judge.ask(queries=asked, judge=texts)["gaps"]
        row["likeliest"], row["largest_gap"] = sum(gap <= 0 for gap in gaps) / len(gaps), max(gaps)
        for key in ("first_token_seconds", "alone"):
            values = [answer[key] for answer in counted if answer.get(key)]
            row[key] = statistics.median(values) if values else None
        rows.append(row)
    return rows


def _queries(count: int, number: int) -> list[str]:
    """Queries that no earlier round has had."""
    return [
        f"Tell me about {SUBJECTS[i % len(SUBJECTS)]} {1000 * number + 7 * i + count} and where it comes from."
        for i in range(count)
    ]


def _floor(threads: int) -> dict[str, Any]:
    """What the machine reads per second, and the tokens that the stored bytes allow."""
    import torch

    from embedgrad.model.model import load_model
    from embedgrad.tasks import smollm2

    torch.set_num_threads(threads)
    model = load_model(smollm2.path(), weights="stored")
    stored = sum(x.nbytes for x in model.weights.tensors())
    data = torch.ones(1 << 27)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - started)
    rate = data.nbytes / statistics.median(times)
    return {"question": "decode", "contender": "byte floor", "stored_bytes": stored, "bytes_per_second": rate,
            "tokens_per_second": rate / stored, "threads": threads}  # fmt: skip


def _print(rows: list[dict[str, Any]], most: int) -> None:
    floor = rows[-1]
    print(
        f"reading {floor['stored_bytes'] / 1e6:.0f} MB at {floor['bytes_per_second'] / 1e9:.1f} GB/s allows "
        f"{floor['tokens_per_second']:.0f} tokens/s to one sequence"
    )
    print(
        f"{'queries':>7} {'contender':<18} {'tokens/s':>9} {'20..80 %':>13} {'alone':>7} {'first token':>11}  "
        "likeliest, largest gap"
    )
    for row in rows[:-1]:
        alone = f"{row['alone']:7.0f}" if row["alone"] else f"{'':>7}"
        first = f"{row['first_token_seconds'] * 1e3:8.0f} ms" if row["first_token_seconds"] else f"{'':>11}"
        print(
            f"{row['queries']:>7} {row['contender']:<18} {row['tokens_per_second']:9.1f} "
            f"{row['tokens_per_second_20']:6.1f}..{row['tokens_per_second_80']:<6.1f}{alone} {first}  "
            f"{row['likeliest']:9.2%} {row['largest_gap']:.2f}"
        )
    for count in sorted({row["queries"] for row in rows[:-1]}):
        found = {row["contender"]: row for row in rows[:-1] if row["queries"] == count}
        llama = [row["tokens_per_second"] for name, row in found.items() if name.startswith("llama.cpp")]
        ours = found["embedgrad stored"]["tokens_per_second"]
        if llama:
            print(f"{count} queries: {ours / max(llama):.2f} times llama.cpp at its best number of slots")


# ---- the contenders' side --------------------------------------------------------------------------------------------


def _work(name: str, threads: int) -> None:
    judge: Judge | None = None
    if name.startswith("llama.cpp"):
        write, version = _llama(int(name.split()[1]), threads)
    elif name == "transformers":
        write, version = _transformers()
    else:
        write, judge, version = _embedgrad("stored" if name.endswith("stored") else "compute")
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


def _embedgrad(weights: str) -> tuple[Write, Judge, str]:
    import torch

    import embedgrad
    from embedgrad.prefill import own_contexts, shared_context
    from embedgrad.rendering import render_query
    from embedgrad.tasks import smollm2

    model = embedgrad.load_model(smollm2.path(), weights=weights)
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
                logits = cache.next_logits(torch.tensor([token]))
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


def _transformers() -> tuple[Write, str]:
    import torch
    import transformers

    import embedgrad
    from bench.twin import transformers_twin
    from embedgrad.tasks import smollm2

    ours = embedgrad.load_model(smollm2.path())
    tokenizer, system = ours.tokenizer, _system(ours.tokenizer)
    model: Any = transformers_twin(ours, attention="sdpa")
    eos = sorted(tokenizer.eos_ids)

    def write(queries: Sequence[str], tokens: int) -> tuple[list[str], int]:
        rows = [tokenizer.encode(_conversation(system, query)) for query in queries]
        longest = max(map(len, rows))
        ids = torch.tensor([[eos[0]] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos[0]
            )[:, longest:].tolist()
        answers = []
        for row in out:
            end = next((i for i, token in enumerate(row) if token in eos), len(row))
            answers.append((tokenizer.decode(row[:end]), min(end + 1, len(row))))
        return [text for text, _ in answers], sum(count for _, count in answers)

    return write, f"transformers {transformers.__version__}, torch {torch.__version__}"
