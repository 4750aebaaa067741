"""Who writes answers behind one prompt: embedgrad, llama.cpp and transformers, on SmolLM2-135M-Instruct, greedily.

Each is imported where it is needed, since a process holds one of them only.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

SYSTEM = "You are a helpful assistant that explains things to people in plain words and short sentences. "
PROMPT_TOKENS = 190
SEQUENCE_TOKENS = 512  # the longest sequence that llama.cpp has room for
OURS = ("embedgrad stored", "embedgrad float32")

Write = Callable[[Sequence[str], int], tuple[list[str], int]]
"""(queries, most new tokens) → texts, number of tokens written."""
Judge = Callable[[Sequence[str], Sequence[str]], list[float]]
"""(queries, texts) → for each token, how far its logit is below the likeliest token's."""


@dataclass(frozen=True)
class Writer:
    """A contender, ready to write; `judge` is there for ours only."""

    write: Write
    version: str
    judge: Judge | None = None


def writer(name: str, threads: int, device: str) -> Writer:
    """The contender `name`: one of OURS, "transformers", or "llama.cpp SLOTS"."""
    if name.startswith("llama.cpp"):
        return _llama(int(name.split()[1]), threads)
    if name == "transformers":
        return _transformers(device)
    return _embedgrad("stored" if name.endswith("stored") else "compute", device)


def _system(tokenizer: Any) -> str:
    """The prompt's text, of PROMPT_TOKENS tokens."""
    return tokenizer.decode(tokenizer.encode(SYSTEM * 40)[:PROMPT_TOKENS])


def _conversation(system: str, query: str) -> str:
    """SmolLM2's chat template."""
    turns = (("system", system), ("user", query))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def _embedgrad(weights: str, device: str) -> Writer:
    import torch

    import embedgrad
    from embedgrad.generation.prefill import prefill_prefix, prefill_suffixes
    from embedgrad.prompt.rendering import render_query
    from embedgrad.tasks import smollm2

    model = embedgrad.load_model(smollm2.path(), weights=weights, device=device)
    prompt = embedgrad.SoftPrompt.from_text(model, _system(model.tokenizer))

    def write(queries: Sequence[str], tokens: int) -> tuple[list[str], int]:
        answers = embedgrad.generate(model, prompt, queries, embedgrad.Sampling(max_new_tokens=tokens))
        return [a.text for a in answers], sum(len(a.log_probabilities) for a in answers)

    def judge(queries: Sequence[str], texts: Sequence[str]) -> list[float]:
        gaps = []
        for query, text in zip(queries, texts, strict=True):
            sequence, embeddings = render_query(model, prompt, query), prompt.embeddings.to(model.device)
            prefix = prefill_prefix(model, embeddings, sequence, len(sequence.ids) - 1)
            cache, logits = prefill_suffixes(model, embeddings, [sequence], prefix)
            for token in model.tokenizer.encode(text)[:-1]:  # a text that was cut may end within a token
                gaps.append(float(logits.max() - logits[0, token]))
                logits = cache.next_logits(torch.tensor([token], device=model.device))
        return gaps

    return Writer(write, f"embedgrad {embedgrad.__version__}, backend {model.backend}", judge)


def _llama(slots: int, threads: int) -> Writer:
    import xllamacpp

    from embedgrad.engine.model import load_model
    from embedgrad.tasks import smollm2

    system = _system(load_model(smollm2.path(), weights="stored").tokenizer)
    params = xllamacpp.CommonParams()
    params.model.path = str(smollm2.path())
    params.n_parallel, params.n_ctx, params.cache_prompt, params.verbosity = slots, slots * SEQUENCE_TOKENS, True, -1
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

    write([f"What is {i}?" for i in range(slots)], 4)  # brings the prompt into every slot's cache
    return Writer(write, f"xllamacpp {importlib.metadata.version('xllamacpp')}")


def _transformers(device: str) -> Writer:
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
        sequences = [tokenizer.encode(_conversation(system, query)) for query in queries]
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
        texts = [tokenizer.decode(written[:end]) for written, end in zip(out, ends, strict=True)]
        return texts, sum(min(end + 1, len(written)) for written, end in zip(out, ends, strict=True))

    return Writer(write, f"transformers {transformers.__version__}, torch {torch.__version__}")
