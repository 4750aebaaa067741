"""Checks an exported GGUF file with llama.cpp, which the package xllamacpp brings."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedgrad.exports.chat_template import VARIABLE
from embedgrad.exports.check.ours import engine, next_logits
from embedgrad.exports.check.report import CheckReport, require_close, require_ids, same_likeliest
from embedgrad.exports.gguf import read_rows
from embedgrad.exports.gguf_file import stored_rows
from embedgrad.exports.same_ids import QUERIES, conversations
from embedgrad.exports.source import NamedPrompt, Source
from embedgrad.exports.vocabulary import Vocabulary
from embedgrad.model.files.gguf import GgufFile
from embedgrad.prompt.rendering import Rendered
from embedgrad.prompt.sandbox import compile_chat_template
from embedgrad.util.errors import ExportError
from embedgrad.util.shown import first_line

TOP = 40  # likeliest tokens whose log-probabilities are compared
# llama.cpp rounds activations to 8 bits and keys to float16; it may be this much farther off than for plain text.
NOISE, SLACK = 3.0, 0.05
BIAS = 60.0  # added to the logit of a new token, which must stay suppressed
_WAIT = 600  # seconds for an answer
_ONE = {"n_predict": 1, "temperature": -1, "cache_prompt": False, "return_tokens": True}


def check_gguf(source: Source, prompts: Sequence[NamedPrompt], words: Vocabulary, path: Path) -> CheckReport:
    """Renders conversations with llama.cpp's tokenizer and template and compares ids and log-probabilities.

    Raises ExportError where they differ by more than llama.cpp's own rounding of plain text.
    """
    program = f"llama.cpp (xllamacpp {importlib.metadata.version('xllamacpp')})"
    asked = conversations(source, prompts, words)
    plain = _plain(source)
    longest = max(len(ids) for ids in [*(each.ids for each in asked), *plain])
    with _server(path, longest + 32, program) as ask:
        found, letter = [], source.tokenizer.encode("a")[-1]
        for each in asked:
            body = {"messages": each.messages, "chat_template_kwargs": {VARIABLE: each.name}}
            text = ask("/apply-template", body)["prompt"]
            ids = ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
            require_ids(program, each.name, each.query, ids, each.ids)
            found.append(_log_probabilities(ask, each.ids, letter))
        noise = [_log_probabilities(ask, ids, letter) for ids in plain]
        written = ask("/completion", {"prompt": asked[0].ids, "logit_bias": [[words.ids[0], BIAS]], **_ONE})["tokens"]
    if words.ids[0] in written:
        raise ExportError(f"{program} does not suppress the new tokens; use a newer one, or --untie.")
    found, noise = (
        [{token: value for token, value in each.items() if token not in words.ids} for each in several]
        for several in (found, noise)
    )
    stored = GgufFile(path)
    kind = next(tensor.kind for tensor in stored.stored() if tensor.name == "token_embd.weight")
    ours, exact, rounded = engine(source), [], []
    for named in prompts:
        rendered = [each.rendered for each in asked if each.name == named.name]
        rows = named.prompt.embeddings.detach().float()
        exact.append(next_logits(ours, rows, rendered))
        as_stored = read_rows(stored_rows(rows, kind, exact=True), kind)
        rounded.append(next_logits(ours, as_stored, rendered))
    nothing = torch.zeros(1, source.config.hidden_size)
    texts = next_logits(ours, nothing, [Rendered(ids, [-1] * len(ids), [False] * len(ids), 0) for ids in plain])
    return _compared(program, found, torch.cat(exact), torch.cat(rounded), noise, texts, words)


def _compared(
    program: str,
    found: Sequence[dict[int, float]],
    exact: Tensor,
    rounded: Tensor,
    plain: Sequence[dict[int, float]],
    texts: Tensor,
    words: Vocabulary,
) -> CheckReport:
    own = [id for id in words.ids if id < exact.shape[1]]
    for logits in (exact, rounded, texts):
        logits[:, own] = -torch.inf
    noise = _largest(plain, texts)
    difference = _largest(found, rounded)
    allowed = NOISE * noise + SLACK
    rows = [torch.full((exact.shape[1],), -torch.inf) for _ in found]
    for row, each in zip(rows, found, strict=True):
        row[torch.tensor(list(each))] = torch.tensor(list(each.values()))
    agreement = sum(same_likeliest(a, b, 2 * allowed) for a, b in zip(rows, rounded, strict=True))
    require_close(program, difference, allowed, agreement, len(found))
    exactly = sum(same_likeliest(a, b, 0) for a, b in zip(rows, exact, strict=True))
    rounding = _largest([{i: float(row[i]) for i in each} for row, each in zip(rounded, found, strict=True)], exact)
    return CheckReport(program, len(found), _largest(found, exact), rounding, exactly, unit="logit", noise=noise)


def _largest(found: Sequence[dict[int, float]], logits: Tensor) -> float:
    """The largest difference to `logits` [n, V] of a token's distance to the likeliest token.

    The distance does not depend on the probability that llama.cpp sees in the new tokens.
    """
    worst = 0.0
    for each, row in zip(found, logits, strict=True):
        best = max(each, key=lambda token: each[token])
        for token, value in each.items():
            worst = max(worst, abs(value - each[best] - float(row[token] - row[best])))
    return worst


def _plain(source: Source) -> list[list[int]]:
    """Conversations without a prompt, as ids."""
    tokenizer = source.tokenizer
    if tokenizer.chat_template is None:
        return [tokenizer.encode(query) for query in QUERIES]
    template = compile_chat_template(tokenizer.chat_template)
    return [
        tokenizer.encode(
            template.render([{"role": "user", "content": query}], tokenizer.special, add_generation_prompt=True)
        )
        for query in QUERIES
    ]


def _log_probabilities(ask: Any, ids: Sequence[int], letter: int) -> dict[int, float]:
    """The log-probabilities of the likeliest next tokens, by id."""
    # The server shows a token's probabilities only when its text is a whole character, so a letter is forced.
    body = {"prompt": list(ids), "n_probs": TOP, "logit_bias": [[letter, 1000.0]], **_ONE}
    step = ask("/completion", body)["completion_probabilities"][0]
    return {each["id"]: each["logprob"] for each in step["top_logprobs"] if each["logprob"] > -80}


@contextlib.contextmanager
def _server(path: Path, context: int, program: str) -> Iterator[Any]:
    """llama.cpp's server in this process. Gives ask(address, body) → answer."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx, params.verbosity, params.warmup = 1, context, -1, False
    params.port, params.use_jinja = 0, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    try:
        server = xllamacpp.Server(params)
    except Exception as error:
        raise ExportError(f"{program} does not load the export: {first_line(error)}.") from error

    def ask(address: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            server.listening_address + address, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_WAIT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:200]
            raise ExportError(f"{program} refuses {address}: {said}.") from error
        except (OSError, ValueError) as error:
            raise ExportError(f"{program} does not answer {address}: {error}.") from error

    yield ask
