"""Who writes answers behind one prompt: embedgrad, llama.cpp and transformers, from one model file, greedily.

Each is imported where it is needed, since a process holds one of them only.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM = "You are a helpful assistant that explains things to people in plain words and short sentences. "
PROMPT_TOKENS = 190
SEQUENCE_TOKENS = 512  # the longest sequence that llama.cpp has room for
OURS = ("embedgrad stored", "embedgrad float32")


@dataclass(frozen=True)
class Query:
    """What follows the prompt, as text; and the tokens of prompt and query."""

    text: str
    ids: list[int]


Written = list[int] | tuple[str, int]
"""The tokens of an answer without its end; or its text and how many tokens were written."""
Write = Callable[[Sequence[Query], int], tuple[list[Written], int]]
"""(queries, most new tokens) → answers, number of tokens written."""
Judge = Callable[[Sequence[Query], Sequence[Written]], list[float]]
"""(queries, answers) → for each token, how far its logit is below the likeliest token's."""


@dataclass(frozen=True)
class Writer:
    """A contender, ready to write; `judge` is there for ours only."""

    write: Write
    version: str
    judge: Judge | None = None


def writer(name: str, path: Path, threads: int, device: str) -> Writer:
    """The contender `name` (one of OURS, "transformers", or "llama.cpp SLOTS") with the model at `path`."""
    if name.startswith("llama.cpp"):
        return _llama(path, int(name.split()[1]), threads)
    if name == "transformers":
        return _transformers(path, device)
    return _embedgrad(path, "stored" if name.endswith("stored") else "compute", device)


def long_prompt(model: Any) -> Any:
    """A prompt of PROMPT_TOKENS tokens."""
    import embedgrad

    text = model.tokenizer.decode(model.tokenizer.encode(SYSTEM * 40)[:PROMPT_TOKENS])
    return embedgrad.SoftPrompt.from_text(model, text)


def renderer(path: Path) -> Callable[[str], Query]:
    """Brings a text behind the prompt, for every contender with the same tokens."""
    import embedgrad
    from embedgrad.prompt.rendering import render_query

    model = embedgrad.load_model(path, weights="stored")
    prompt = long_prompt(model)
    return lambda text: Query(text, render_query(model, prompt, text).ids)


def _embedgrad(path: Path, weights: str, device: str) -> Writer:
    import torch

    import embedgrad
    from embedgrad.generation.prefill import prefill_prefix, prefill_suffixes
    from embedgrad.prompt.rendering import render_query

    model = embedgrad.load_model(path, weights=weights, device=device)
    prompt = long_prompt(model)

    def write(queries: Sequence[Query], tokens: int) -> tuple[list[Written], int]:
        answers = embedgrad.generate(
            model, prompt, [q.text for q in queries], embedgrad.Sampling(max_new_tokens=tokens)
        )
        return [list(a.ids) for a in answers], sum(len(a.log_probabilities) for a in answers)

    def judge(queries: Sequence[Query], answers: Sequence[Written]) -> list[float]:
        gaps = []
        for query, answer in zip(queries, answers, strict=True):
            sequence, embeddings = render_query(model, prompt, query.text), prompt.embeddings.to(model.device)
            prefix = prefill_prefix(model, embeddings, sequence, len(sequence.ids) - 1)
            cache, logits = prefill_suffixes(model, embeddings, [sequence], prefix)
            for token in _ids(model.tokenizer, answer):
                gaps.append(float(logits.max() - logits[0, token]))
                logits = cache.next_logits(torch.tensor([token], device=model.device))
        return gaps

    return Writer(write, f"embedgrad {embedgrad.__version__}, backend {model.backend}", judge)


def _ids(tokenizer: Any, answer: Written) -> list[int]:
    """The tokens of an answer; none where a text has more or fewer tokens than were written, so that some differ."""
    if isinstance(answer[0] if answer else 0, int):
        return [int(id) for id in answer]
    text, count = answer
    ids: list[int] = tokenizer.encode(text)
    return ids if len(ids) in (count, int(count) - 1) else []  # an end token has no text


def llama_server(path: Path, slots: int, threads: int, port: int | None = None) -> tuple[Any, str]:
    """(llama.cpp's server with its prompt cache on, its version). port: it listens there too; 0: at any free one."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx, params.cache_prompt, params.verbosity = slots, slots * SEQUENCE_TOKENS, True, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if port is not None:
        params.port, params.use_jinja = port, True
    return xllamacpp.Server(params), f"xllamacpp {importlib.metadata.version('xllamacpp')}"


def _llama(path: Path, slots: int, threads: int) -> Writer:
    server, version = llama_server(path, slots, threads)

    def one(query: Query, tokens: int) -> tuple[str, int]:
        request = {"prompt": query.ids, "n_predict": tokens, "temperature": 0.0}
        answer = server.handle_completions({**request, "cache_prompt": True})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

    def write(queries: Sequence[Query], tokens: int) -> tuple[list[Written], int]:
        with ThreadPoolExecutor(len(queries)) as pool:
            answers = list(pool.map(lambda query: one(query, tokens), queries))
        return [*answers], sum(count for _, count in answers)

    return Writer(write, version)


def _transformers(path: Path, device: str) -> Writer:
    import torch
    import transformers

    import embedgrad
    from embedgrad.compare.twin import transformers_twin

    ours = embedgrad.load_model(path, device=device)
    model, eos = transformers_twin(ours, attention="sdpa"), sorted(ours.tokenizer.eos_ids)

    def write(queries: Sequence[Query], tokens: int) -> tuple[list[Written], int]:
        sequences = [query.ids for query in queries]
        longest = max(map(len, sequences))
        padding = [longest - len(sequence) for sequence in sequences]
        padded = [[eos[0]] * n + sequence for n, sequence in zip(padding, sequences, strict=True)]
        ids = torch.tensor(padded, device=device)
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos[0]
            )[:, longest:].tolist()
        ends = [next((i for i, token in enumerate(written) if token in eos), len(written)) for written in out]
        answers: list[Written] = [written[:end] for written, end in zip(out, ends, strict=True)]
        return answers, sum(min(end + 1, len(written)) for written, end in zip(out, ends, strict=True))

    return Writer(write, f"transformers {transformers.__version__}, torch {torch.__version__}")
