"""lm-evaluation-harness on our engine: its model `embedgrad`, with or without a prompt.

Contexts are texts. A mark stands in for the prompt, whose tokens have the ids V, V + 1, … behind the vocabulary of V
tokens, as in an exported copy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from embedgrad.engine.model import Model, load_model
from embedgrad.engine.scorer import Scorer
from embedgrad.engine.tree import prepare
from embedgrad.generation.generate import write_sequences
from embedgrad.generation.sampling import Sampling
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import Rendered
from embedgrad.serve.served import ServedModel
from embedgrad.util.errors import ConfigError, DataError, TrainingError

MARK = "\uf8f0prompt\uf8f1"  # private-use characters; no data has this text
BATCH = 32  # instead of the harness' default of 1; the batch size changes speed only
_TOGETHER = 64  # sequences of one forward pass; they share what they have in common
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_PASSED = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")

Scored = tuple[tuple[str, str], list[int], list[int]]


class TruncationWarning(UserWarning):
    """A context was too long and has lost its beginning."""


class EmbedGradLM(TemplateLM):
    """The model `embedgrad` of lm-evaluation-harness.

    With a prompt every context gets it: with --apply_chat_template in the conversation, otherwise the whole context is
    one query of the prompt. Without a prompt it is the bare model.

    model (or pretrained): folder, .gguf file or hub id. prompt: a prompt file. dtype, backend, device, weights: as for
    `load_model`. batch_size: answers that are written at the same time; 1 and "auto" mean 32. max_length: tokens of a
    context with its continuation; default: the model's context. max_gen_toks: longest answer of tasks that set none.
    Raises EmbedGradError.
    """

    def __init__(
        self,
        model: str | Model | None = None,
        prompt: str | SoftPrompt | None = None,
        *,
        pretrained: str | None = None,
        dtype: str | None = None,
        backend: str = "auto",
        device: str | None = None,
        weights: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        chosen = model if model is not None else pretrained
        if chosen is None:
            raise ConfigError(
                "the harness' model embedgrad needs --model_args model=PATH, and prompt=FILE for a prompt."
            )
        usable = device is not None and (torch.cuda.is_available() or not device.startswith("cuda"))
        place = device if device is not None and usable else "auto"  # the harness asks for cuda:0 on any machine
        opened = chosen if isinstance(chosen, Model) else load_model(chosen, dtype, backend, place, weights)
        loaded = prompt if isinstance(prompt, SoftPrompt) or prompt is None else SoftPrompt.load(prompt, opened)
        if loaded is not None:
            loaded.check_model(opened)
        self._served = ServedModel(opened, "prompt", loaded)
        self._vocabulary = opened.config.vocab_size
        asked = str(batch_size)
        self._batch = int(asked) if asked.isdigit() and int(asked) > 1 else BATCH
        self.max_length = min(max_length or opened.config.max_position, opened.config.max_position)
        self.max_gen_toks = max_gen_toks

    @cached_property
    def _beginning(self) -> tuple[Rendered, int]:
        """See `ServedModel.prefix`."""
        return self._served.prefix()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return min(self._served.model.tokenizer.eos_ids, default=0)

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty context stands for."""
        bos = self._served.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness' caches: another prompt is another tokenizer."""
        served = self._served
        hashed = "" if served.prompt is None else f"+{served.prompt.anchor_hash[:12]}"
        return f"embedgrad:{served.model.name}{hashed}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's chat template, for the harness' records."""
        return self._served.model.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; it ends inside the last message where no generation prompt is added."""
        text = self._served.text(chat_history, MARK, None, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; those of the prompt's rows are V, V + 1, …"""
        served = self._served
        tokenizer = served.model.tokenizer
        rendered = served.tokens(string, MARK)
        pairs = zip(rendered.ids, rendered.prompt_rows, strict=True)
        ids = [id if row < 0 else self._vocabulary + row for id, row in pairs]
        bos, wanted = tokenizer.bos_id, tokenizer.adds_bos if add_special_tokens is None else add_special_tokens
        if wanted and bos is not None and MARK not in string and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each continuation after its context."""
        pairs = [(self._with_prompt(context), continuation) for context, continuation in _arguments(requests)]
        encoded = [((context, text), *self._encoded(context, text)) for context, text in pairs]
        return self._loglikelihood_tokens(encoded)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text. Raises DataError with a prompt: such a text has no place for one."""
        if self._served.prompt is not None:
            raise DataError("this task scores whole texts (loglikelihood_rolling), in which a prompt has no place.")
        windows, owners = [], []
        for number, (text,) in enumerate(_arguments(requests)):
            parts = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, parts):
                windows.append((("", ""), list(context), list(continuation)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, cut at the task's stop texts."""
        arguments = list(_arguments(requests))
        groups: dict[str, tuple[Sampling, list[int]]] = {}
        for number, (_, options) in enumerate(arguments):
            sampling = self._sampling(options)
            groups.setdefault(str(sampling), (sampling, []))[1].append(number)
        answers, served = [""] * len(arguments), self._served
        for sampling, numbers in groups.values():
            contexts = [self._context(arguments[number][0], sampling.max_new_tokens) for number in numbers]
            found = write_sequences(
                served.model, served.embeddings, served.end, contexts, sampling, batch_size=self._batch
            )
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer.text
                self.cache_hook.add_partial("generate_until", arguments[number], answer.text)
        return answers

    def _loglikelihood_tokens(self, requests: list[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        """The same for encoded pairs. Pairs with the same context are computed together."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = [i for i in sorted(range(len(requests)), key=lambda i: requests[i][1]) if requests[i][2]]
        for chunk in (order[at : at + _TOGETHER] for at in range(0, len(order), _TOGETHER)):
            sequences = [self._sequence(*requests[i][1:]) for i in chunk]
            details = Scorer(self._served.model, [prepare(sequences)]).details(self._served.embeddings, 0)
            for i, nll, exact in zip(chunk, details.token_nll, details.exact.tolist(), strict=True):
                if not bool(nll.isfinite().all()):
                    raise TrainingError(
                        f"request {i} has a log-likelihood that is not finite: the model overflows in its dtype for "
                        "this text (compute in float32), or its weights or the prompt are damaged (fetch them again)."
                    )
                found[i] = -math.fsum(nll.double().tolist()), bool(exact)
        for request, answer in zip(requests, found, strict=True):
            if request[0] != ("", ""):
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return found

    def _with_prompt(self, context: str) -> str:
        """A context in which the prompt stands; the whole context is a query where it does not."""
        if self._served.prompt is None or MARK in context:
            return context
        if not context.strip():
            raise DataError("this task has an empty context, and a prompt needs a query.")
        return self._served.text([{"role": "user", "content": context}], MARK)

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of context and continuation."""
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        prefix = self.prefix_token_id
        return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)

    def _context(self, context: str, most: int) -> Rendered:
        """The sequence of a context that leaves room for an answer."""
        ids = self._fitting(
            self.tok_encode(self._with_prompt(context)) or [self.prefix_token_id], self.max_length - most
        )
        return self._rendered(ids, [False] * len(ids))

    def _sequence(self, context: Sequence[int], continuation: Sequence[int]) -> Rendered:
        kept = self._fitting(list(context), self.max_length + 1 - len(continuation))  # the last token is no input
        return self._rendered([*kept, *continuation], [False] * len(kept) + [True] * len(continuation))

    def _fitting(self, ids: list[int], room: int) -> list[int]:
        """`ids` cut to `room`: the beginning that all conversations share stays, and tokens right behind it go."""
        excess = len(ids) - max(room, 1)
        if excess <= 0:
            return ids
        shared = 0
        if self._served.prompt is not None:
            sequence, shared = self._beginning
            shared = shared if ids[: min(shared, 1)] == sequence.ids[: min(shared, 1)] else 0
        if len(ids) - shared <= excess:
            raise DataError(
                f"a context of {len(ids)} tokens does not fit into {self.max_length} with its continuation."
            )
        warnings.warn(f"a context of {len(ids)} tokens has lost {excess} of them.", TruncationWarning, stacklevel=2)
        return ids[:shared] + ids[shared + excess :]

    def _rendered(self, ids: Sequence[int], targets: list[bool]) -> Rendered:
        rows = [id - self._vocabulary if id >= self._vocabulary else -1 for id in ids]
        prompt = self._served.prompt
        own = [id if row < 0 or prompt is None else prompt.token_ids[row] for id, row in zip(ids, rows, strict=True)]
        return Rendered(own, rows, targets, 0)

    def _sampling(self, options: Mapping[str, Any]) -> Sampling:
        """The settings of a task's generation. Raises ConfigError."""
        until = options.get("until") or []
        length = next((options[name] for name in _LENGTHS if options.get(name) is not None), self.max_gen_toks)
        sampled = options.get("do_sample", float(options.get("temperature") or 0) > 0)
        chosen = {name: options[name] for name in _PASSED if options.get(name) is not None} if sampled else {}
        return Sampling(
            max_new_tokens=min(int(length), self.max_length - 1),
            temperature=float(options.get("temperature") or 1.0) if sampled else 0.0,
            stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            **chosen,
        )


def _arguments(requests: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    return (request.args for request in requests)
