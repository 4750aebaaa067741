"""The bodies of responses, as the OpenAI API has them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from embedgrad.generation.writer import Generation
from embedgrad.model.tokenizer import Tokenizer

FINISH = {"stop": "stop", "length": "length", "context": "length"}
_INCOMPLETE = "\ufffd"

Top = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Chosen:
    """A token of an answer: its log-probability, and the likeliest tokens with theirs (None: not asked for)."""

    id: int
    log_probability: float
    top: Top | None = None


@dataclass
class Usage:
    """Tokens of a request. cached: those of the inputs whose keys and values were there already."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def body(self) -> dict[str, Any]:
        """The `usage` of a response."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class Envelope:
    """What all bodies of one response share. chat: a chat completion, else a text completion."""

    chat: bool
    model: str
    tokenizer: Tokenizer
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = self.id or f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"

    def whole(self, answers: Sequence[Generation], tokens: Sequence[Sequence[Chosen] | None], usage: Usage) -> Any:
        """The body of a response that is not streamed. tokens: for each answer those to show; None: not asked for."""
        pairs = zip(answers, tokens, strict=True)
        choices = [self._choice(i, answer, shown) for i, (answer, shown) in enumerate(pairs)]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage.body()}

    def piece(self, index: int, text: str, shown: Sequence[Chosen] | None, finish: str | None, first: bool) -> Any:
        """The body of one event of a stream."""
        choice: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": self._log_probabilities(shown)}
        if self.chat:
            delta = {"role": "assistant", "content": text} if first else {"content": text} if text else {}
            choice = {**choice, "delta": delta}
        else:
            choice = {**choice, "text": text}
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": [choice]}

    def last(self, usage: Usage) -> Any:
        """The body of the event that tells the usage."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage.body()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, answer: Generation, shown: Sequence[Chosen] | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": FINISH[answer.stop_reason]}
        choice["logprobs"] = self._log_probabilities(shown)
        if self.chat:
            return {**choice, "message": {"role": "assistant", "content": answer.text, "refusal": None}}
        return {**choice, "text": answer.text}

    def _log_probabilities(self, shown: Sequence[Chosen] | None) -> dict[str, Any] | None:
        if shown is None:
            return None
        if self.chat:
            return {"content": [{**self._told(t.id, t.log_probability), "top_logprobs": self._top(t)} for t in shown]}
        texts = [self._text(token.id) for token in shown]
        tops = [{self._text(i): p for i, p in zip(*token.top, strict=True)} if token.top else {} for token in shown]
        return {
            "tokens": texts,
            "token_logprobs": [token.log_probability for token in shown],
            "top_logprobs": tops,
            "text_offset": [sum(map(len, texts[:n])) for n in range(len(texts))],
        }

    def _top(self, token: Chosen) -> list[dict[str, Any]]:
        return [self._told(id, p) for id, p in zip(*token.top, strict=True)] if token.top else []

    def _told(self, id: int, log_probability: float) -> dict[str, Any]:
        text = self._text(id)
        # A part of a character has no text, and its bytes are not known here.
        known = None if _INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": max(log_probability, -9999.0), "bytes": known}

    def _text(self, id: int) -> str:
        return self.tokenizer.texts([id])[0]
