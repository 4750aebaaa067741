"""`embedgrad generate`: answers queries from options, a file or stdin, or in a conversation at the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from embedgrad.data.readers import query_lines, read_queries
from embedgrad.engine.model import Model
from embedgrad.generation.generate import Generation, generate
from embedgrad.generation.sampling import Sampling
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.util.errors import DataError, EmbedGradError, SaveError
from embedgrad.util.files import behind_links, check_target
from embedgrad.util.shown import visible

DIGITS = 4  # decimal places of an answer's figures


@dataclass(frozen=True)
class Options:
    """The options of the command line without model and prompt."""

    queries: list[str]
    input: Path | None = None
    output: Path | None = None
    query_field: str = "query"
    batch_size: int = 32
    as_json: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)


def run(open_model: Callable[[], Model], prompt_path: Path, options: Options) -> None:
    """Runs the command. The queries are read before the model is opened. Raises EmbedGradError."""
    interactive = not options.queries and options.input is None and sys.stdin.isatty()
    queries = [] if interactive else _queries(options)
    SoftPrompt.load(prompt_path)
    model = open_model()
    prompt = SoftPrompt.load(prompt_path, model)
    sampling = Sampling(**options.sampling)
    if interactive:
        _converse(model, prompt, sampling)
        return
    with _sink(options) as write:
        waiting: dict[int, Generation] = {}
        written = 0

        def take(index: int, answer: Generation) -> None:
            nonlocal written
            waiting[index] = answer
            while written in waiting:
                write(queries[written], waiting.pop(written))
                written += 1

        generate(model, prompt, queries, sampling, batch_size=options.batch_size, on_answer=take)


def _queries(options: Options) -> list[str]:
    queries = list(options.queries)
    if options.input is not None:
        queries += read_queries(options.input, options.query_field)
    elif not queries:
        queries = query_lines(sys.stdin.buffer, "stdin")
    if not queries:
        raise DataError("there are no queries: give --query or --input, or lines on stdin.")
    return queries


@contextmanager
def _sink(options: Options) -> Iterator[Callable[[str, Generation], None]]:
    """Gives the function that writes an answer to stdout or to the output file.

    The file is named .part until all answers are written. Raises SaveError.
    """
    if options.output is None:
        yield lambda query, answer: _tell(sys.stdout, query, answer, options.as_json)
        return
    output = behind_links(options.output)
    check_target(output)
    part = output.with_name(output.name + ".part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            yield lambda query, answer: _tell(file, query, answer, True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, output)
    except OSError as error:
        raise SaveError(
            f"cannot write {options.output}: {error.strerror or error}; the first answers are in {part}."
        ) from error


def _tell(stream: TextIO, query: str, answer: Generation, as_json: bool) -> None:
    if as_json:
        record = {
            "query": query,
            "text": answer.text,
            "stop_reason": answer.stop_reason,
            "tokens": len(answer.ids),
            "log_probability": round(sum(answer.log_probabilities), DIGITS),
            "token_entropy": round(sum(answer.entropies) / len(answer.entropies), DIGITS),
            "trajectory_entropy": round(answer.trajectory_entropy, DIGITS),
            "windowed_entropy": round(answer.windowed_entropy, DIGITS),
            "loop_period": answer.loop_period,
        }
        stream.write(json.dumps(record, ensure_ascii=stream is sys.stdout) + "\n")  # stdout may have any encoding
    else:
        stream.write((visible(answer.text) if stream.isatty() else answer.text) + "\n")
    stream.flush()


def _converse(model: Model, prompt: SoftPrompt, sampling: Sampling) -> None:
    print("Each line is a query of its own; end with Ctrl-D.", file=sys.stderr)
    while True:
        try:
            query = input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if query.strip():
            try:
                typed = _Typed(model)
                on_token = None if sampling.stop else typed.take  # else the beginning of a stop text would show
                answer = generate(model, prompt, [query], sampling, on_token=on_token)[0]
                print(visible(answer.text[typed.printed :]), flush=True)
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)
            except EmbedGradError as refusal:  # the conversation continues, for instance after a query that is too long
                print(f"embedgrad: {refusal}", file=sys.stderr)


class _Typed:
    """Prints an answer while it is written. A character is printed when all its bytes are there."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._ids: list[int] = []
        self.printed = 0

    def take(self, index: int, token: int) -> None:
        """Prints the text of one more token."""
        self._ids.append(token)
        text = self._model.tokenizer.decode(self._ids)
        if not text.endswith("\ufffd"):
            print(visible(text[self.printed :]), end="", flush=True)
            self.printed = len(text)
