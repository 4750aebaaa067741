"""The bodies of requests, as the OpenAI API has them, and what they ask of the generation.

A field that would change the answer and is not understood is refused. A field whose value is null counts as left out.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from embedgrad.generation.sampling import Sampling
from embedgrad.serve.finite_schema import MAX_TEXTS, texts_of
from embedgrad.util.errors import DataError

MAX_ANSWERS = 16  # answers to one request
MAX_TOP = 20  # likeliest tokens that are shown, as in the OpenAI API


def _whole(value: Any) -> Any:
    """JSON has one type of number: 1.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _boolean(value: Any) -> Any:
    """0 equals False in Python, and so it would fit Literal[False]."""
    if value is not None and not isinstance(value, bool):
        raise ValueError("input should be a boolean")
    return value


_WHOLE = BeforeValidator(_whole)  # stands behind the bounds, which else are missing in the document
_Text = Annotated[str, Field(min_length=1, max_length=1000)]
_Token = Annotated[int, Field(ge=0, lt=2**31), _WHOLE]
_Prompt = Annotated[str, Field(min_length=1)]
_Choices = Annotated[list[_Text], Field(min_length=1, max_length=MAX_TEXTS)]
_SEEDS = 1 << 64


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(_Strict):
    """`response_format.json_schema`."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class TextFormat(_Strict):
    """`response_format`: any text."""

    type: Literal["text"]


class JsonFormat(_Strict):
    """`response_format`: a JSON schema that allows finitely many values."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class StructuredOutputs(_Strict):
    """vLLM's `structured_outputs`: a list of texts, one of which the answer is."""

    choice: _Choices


class _Body(_Strict):
    """What both kinds of requests have. `max_tokens` defaults to the server's limit, `temperature` to 0."""

    model: str = Field(max_length=256)
    max_tokens: Annotated[int, Field(ge=1, lt=2**31), _WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31), _WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS), _WHOLE] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64), _WHOLE] | None = None
    stop: _Text | Annotated[list[_Text], Field(max_length=16)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], float] | None = Field(default=None, max_length=4096)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    guided_choice: _Choices | None = None
    structured_outputs: StructuredOutputs | None = None
    # These change nothing here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    def texts(self) -> list[str]:
        """The texts of which the answer must be one; empty: any. Raises DataError."""
        outputs = None if self.structured_outputs is None else self.structured_outputs.choice
        if self.guided_choice is not None and outputs is not None:
            raise DataError("guided_choice and structured_outputs say the same; give one of them.")
        return list(self.guided_choice or outputs or ())

    def sampling(self, most: int) -> Sampling:
        """The settings of an answer of at most `most` tokens. Raises ConfigError."""
        seed = secrets.randbits(63) if self.seed is None else self.seed % _SEEDS
        asked: dict[str, Any] = {
            "top_k": None if self.top_k is None else max(self.top_k, 0),  # −1 means all in other servers
            "top_p": self.top_p,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
        }
        temperature = self.temperature or 0.0
        return Sampling(
            max_new_tokens=min(self.most() or most, most),
            temperature=0.0 if temperature < 1e-5 else temperature,
            seed=seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            **{name: value for name, value in asked.items() if value is not None},
        )

    def most(self) -> int | None:
        """The longest answer that the request asks for, in tokens."""
        return self.max_tokens


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a conversation, with text only."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """The message for a chat template; parts are joined."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ChatBody(_Body):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31), _WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP), _WHOLE] | None = None
    response_format: Annotated[TextFormat | JsonFormat, Field(discriminator="type")] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def texts(self) -> list[str]:
        texts = super().texts()
        if not isinstance(self.response_format, JsonFormat):
            return texts
        if texts:
            raise DataError("response_format and guided_choice say different things; give one of them.")
        return texts_of(self.response_format.json_schema.schema_)

    @property
    def top(self) -> int | None:
        """Likeliest tokens to show beside each token's log-probability; None where none is wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(_Body):
    """The body of /v1/completions. For a model with a prompt, `prompt` is the query."""

    prompt: (
        _Prompt
        | Annotated[list[_Token], Field(min_length=1)]
        | Annotated[list[_Prompt], Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[list[_Token], Field(min_length=1)]], Field(min_length=1, max_length=64)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP), _WHOLE] | None = None
    echo: Annotated[Literal[False] | None, BeforeValidator(_boolean)] = None
    best_of: Annotated[int, Field(ge=1, le=MAX_ANSWERS), _WHOLE] | None = None

    def prompts(self) -> list[str | Sequence[int]]:
        """The prompts, at least one."""
        prompt: Any = self.prompt
        return list(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]

    def sampling(self, most: int) -> Sampling:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise DataError("best_of must equal n: all answers are returned.")
        return super().sampling(most)

    @property
    def top(self) -> int | None:
        """As in `ChatBody`."""
        return self.logprobs


Body = ChatBody | CompletionBody


def read(kind: type[ChatBody] | type[CompletionBody], content: bytes) -> ChatBody | CompletionBody:
    """Reads a body. Raises DataError with one sentence that names the field."""
    try:
        fields = json.loads(content, parse_constant=_no_number, parse_int=_integer)
        return kind.model_validate(_without_nulls(fields))
    except ValidationError as error:
        raise DataError(_sentence(error)) from None
    except RecursionError:
        raise DataError("the body is nested too deeply.") from None
    except ValueError as error:
        raise DataError(f"the body is not valid JSON: {str(error) or type(error).__name__}.") from None


def _without_nulls(fields: Any) -> Any:
    """Without null fields of the body and of its messages, which clients send for what they leave out."""
    if not isinstance(fields, dict):
        return fields
    kept = {name: value for name, value in fields.items() if value is not None}
    messages = kept.get("messages")
    if isinstance(messages, list):
        kept["messages"] = [
            {name: value for name, value in message.items() if value is not None}
            if isinstance(message, dict)
            else message
            for message in messages
        ]
    return kept


def _integer(digits: str) -> int:
    """No field takes an integer of more than 20 digits; Python's own limit names a function of Python."""
    if len(digits) > 1000:
        raise ValueError("a number has too many digits")
    return int(digits)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _sentence(error: ValidationError) -> str:
    """What is wrong first. Of the branches of a union the one that got farthest speaks."""
    first = max(error.errors(include_url=False, include_input=False), key=lambda each: len(each["loc"]))
    shallow = error.errors(include_url=False, include_input=False)[0]
    chosen = first if first["loc"][:1] == shallow["loc"][:1] else shallow
    place = ".".join(str(part) for part in chosen["loc"] if not str(part).startswith(("list[", "constrained-", "str")))
    place = place or "the body"
    if chosen["type"] == "extra_forbidden":
        return f"{place} is not understood here and could change the answer; leave it out."
    if chosen["type"] == "missing":
        return f"{place} is missing."
    return f"{place}: {chosen['msg'][:1].lower()}{chosen['msg'][1:]}."
