"""Writing answers behind one prompt: ours, and `transformers.generate`."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

import embedgrad
from bench.harness.markdown import table
from bench.harness.rows import Row
from bench.on_gpu.others import NEEDS, Twins
from bench.on_gpu.section import Bench, Job, Section, figure, installed
from bench.on_gpu.show import grouped, pick, short

ROUNDS = 3
TOP = 24
OTHERS_AT = (1, 32)  # queries at which transformers is asked
PROFILED_AT = (1, 32)


class _Task:
    """A prompt and queries of random tokens."""

    def __init__(self, bench: Bench, count: int) -> None:
        self.model, sizes = bench.model(bench.first), bench.sizes
        draw = random.Random(3)
        most = min(self.model.config.vocab_size, 400)

        def tokens(n: int) -> list[int]:
            return [draw.randrange(20, most) for _ in range(n)]

        self.prompt = tokens(sizes.prompt_tokens)
        self.queries = [tokens(sizes.query_tokens) for _ in range(count)]
        self._soft = embedgrad.SoftPrompt.from_ids(self.model, self.prompt, template=embedgrad.Template.plain())

    def write(self, tokens: int) -> int:
        """Answers of `tokens` tokens, since random weights hardly ever end one; how many were written."""
        sampling = embedgrad.Sampling(max_new_tokens=tokens)
        count = len(self.queries)
        answers = embedgrad.generate(self.model, self._soft, self.queries, sampling, batch_size=count)
        return sum(len(answer.ids) for answer in answers)


def _case(bench: Bench, count: int) -> dict[str, Any]:
    sizes = bench.sizes
    return {"model": bench.first, "queries": count, "prompt": sizes.prompt_tokens, "query": sizes.query_tokens,
            "tokens": sizes.new_tokens}  # fmt: skip


def _ours(bench: Bench, count: int) -> list[Row]:
    task, device, tokens = _Task(bench, count), bench.device, bench.sizes.new_tokens
    bench.forget()
    written = task.write(tokens)
    if written != count * tokens:
        raise ValueError(f"{written} tokens were written, not {count} times {tokens}")
    seconds = device.wall_seconds(lambda: task.write(tokens), ROUNDS)
    task.write(1)
    first, middle = (statistics.median(x) for x in (device.wall_seconds(lambda: task.write(1), ROUNDS), seconds))
    stored = sum(x.nbytes for x in task.model.weights.tensors())
    return [figure(
        "decode", "embedgrad", [written / each for each in seconds], _case(bench, count), unit="tokens/s",
        first_token_seconds=first, token_seconds=(middle - first) / max(tokens - 1, 1), weight_bytes=stored,
    )]  # fmt: skip


def _profile(bench: Bench, count: int) -> list[Row]:
    task, tokens = _Task(bench, count), bench.sizes.new_tokens
    task.write(tokens)
    found = bench.device.profile(lambda: task.write(tokens))
    top = sorted(found.kernels.items(), key=lambda item: -item[1][0])[:TOP]
    return [figure(
        "decode profile", "embedgrad", [found.busy], _case(bench, count),
        launches=sum(n for _, n in found.kernels.values()), top=[[name, s, n] for name, (s, n) in top],
    )]  # fmt: skip


def _transformers(bench: Bench, twins: Twins, count: int) -> list[Row]:
    task, tokens = _Task(bench, count), bench.sizes.new_tokens
    ids = torch.tensor([task.prompt + query for query in task.queries], device=bench.device.where)
    write = twins.generate(ids, tokens)
    write()
    rates = [count * tokens / seconds for seconds in bench.device.wall_seconds(write, 2)]
    version = installed("transformers") or ""
    return [figure("decode", "transformers", rates, _case(bench, count), version=version, unit="tokens/s")]


def _jobs(bench: Bench) -> Iterator[Job]:
    for count in bench.sizes.decoding:
        yield Job(f"decode, {count} queries", partial(_ours, bench, count), 5)
    for count in (n for n in bench.sizes.decoding if n in PROFILED_AT or bench.device.interpreted):
        yield Job(f"profile of decode, {count} queries", partial(_profile, bench, count), 8)
    twins = Twins(bench.model(bench.first))
    for count in (n for n in bench.sizes.decoding if n in OTHERS_AT or bench.device.interpreted):
        job = partial(_transformers, bench, twins, count)
        yield Job(f"transformers, {count} queries", job, 12, needs=NEEDS["transformers"])


def _table(rows: Sequence[Row]) -> str:
    cells: list[Sequence[object]] = []
    for (count, at), found in grouped(rows, lambda one: int(one.case["queries"])).items():
        ours, other = pick(found, "embedgrad"), pick(found, "transformers")
        token, first = (None if ours is None else ours.more.get(f"{n}_seconds") for n in ("token", "first_token"))
        cells.append((
            count, at, f"{ours.median:,.0f}" if ours else None, f"{token * 1e3:.2f}" if token else None,
            f"{first * 1e3:.0f}" if first else None, f"{other.median:,.0f}" if other else None,
        ))  # fmt: skip
    heads = ("queries", "commit", "tokens/s", "ms a token's step", "ms to the first token", "transformers, tokens/s")
    return table(heads, cells)


def _profiles(rows: Sequence[Row]) -> str:
    cells: list[Sequence[object]] = []
    for (count, at), found in grouped(rows, lambda one: int(one.case["queries"])).items():
        one = found[-1]
        top = "; ".join(f"{short(name)} {s * 1e3:.1f} ({n:,})" for name, s, n in one.more["top"][:14])
        cells.append((count, at, f"{one.median * 1e3:.0f}", top))
    return table(("queries", "commit", "kernels, ms", "most of it, ms (launches)"), cells)


SECTION = Section("decode", "How fast are answers written?", 60, _jobs, _table)
PROFILES = _profiles
