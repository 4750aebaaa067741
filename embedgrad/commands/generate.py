"""`embedgrad generate`: answers to given queries, to a file or to stdin, or at the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from embedgrad.errors import DataError, SaveError
from embedgrad.generation import Generation, generate
from embedgrad.model.model import Model
from embedgrad.prompt import SoftPrompt
from embedgrad.sampling import Sampling


@dataclass(frozen=True)
class Options:
    """What the command was told, less the model and the prompt."""

    queries: list[str]
    input: Path | None = None
    output: Path | None = None
    query_field: str = "query"
    batch_size: int = 32
    as_json: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)


def run(open_model: Callable[[], Model], prompt_path: Path, options: Options) -> None:
    """The command; the input is read before the model is. Raises EmbedGradError."""
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
        try:
            lines = options.input.read_text("utf-8").splitlines()
        except OSError as error:
            raise DataError(f"cannot read the queries {options.input}: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"the queries {options.input} are not UTF-8 text (byte {error.start}).") from error
        as_objects = options.input.suffix in (".jsonl", ".json", ".ndjson")
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{options.input}, line {number}"
                queries.append(_field(line, options.query_field, where) if as_objects else line)
    elif not queries:
        queries = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not queries:
        raise DataError("there are no queries: give --query or --input, or lines on stdin.")
    return queries


def _field(line: str, name: str, where: str) -> str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}.") from None
    if not isinstance(values, dict) or name not in values:
        raise DataError(f"{where} has no field {name!r}; --query-field names another one.")
    if not isinstance(values[name], str) or not values[name].strip():
        raise DataError(f"{where}: the field {name!r} should be text that is not empty.")
    return values[name]


@contextmanager
def _sink(options: Options) -> Iterator[Callable[[str, Generation], None]]:
    """Where answers go, in the queries' order and as soon as they are there; a file is called .part until whole."""
    if options.output is None:
        yield lambda query, answer: _tell(sys.stdout, query, answer, options.as_json)
        return
    part = options.output.with_name(options.output.name + ".part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            yield lambda query, answer: _tell(file, query, answer, True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, options.output)
    except OSError as error:
        raise SaveError(
            f"cannot write {options.output}: {error.strerror or error}; see {part} for a beginning."
        ) from error


def _tell(stream: TextIO, query: str, answer: Generation, as_json: bool) -> None:
    if as_json:
        record = {"query": query, "text": answer.text, "stop_reason": answer.stop_reason}
        stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    else:
        stream.write(answer.text + "\n")
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
                print(generate(model, prompt, [query], sampling)[0].text, flush=True)
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)
