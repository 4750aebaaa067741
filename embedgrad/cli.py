"""The command line: `embedgrad optimize | evaluate | compare | study | report | generate | show | doctor`.

This file only says what the options are. Nothing heavy is imported before a command runs, so `--help` is immediate.
Exit codes: 0 done, 2 refused (one sentence on stderr), 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import embedgrad.waiting  # noqa: F401
from embedgrad.errors import EmbedGradError

app = typer.Typer(
    name="embedgrad",
    help="Tune a prompt's embeddings against a frozen language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PromptFile = Annotated[Path, typer.Argument(help="A prompt file, such as runs/NAME/prompt.safetensors.")]
ModelPath = Annotated[str, typer.Option("--model", "-m", help="Model folder, .gguf file or hub id.")]
DType = Annotated[str | None, typer.Option(help="What is computed in: float32, float64, bfloat16.")]
Weights = Annotated[str, typer.Option(help="How matrices are kept: auto, compute, stored, fp32, bf16, int8, int4.")]
Backend = Annotated[str, typer.Option(help="Which kernels: auto, or one that `doctor` lists.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
QueryField = Annotated[str, typer.Option(help="Field of the JSON lines that holds the query.")]
ConfigFile = Annotated[Path, typer.Argument(help="Configuration file (YAML).")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override one setting: section.key=value; may be repeated.")
]
TaskFolder = Annotated[
    Path | None, typer.Option("--data", "-d", help="Folder with the task's data; default: EMBEDGRAD_DATA.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of text for people.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")]


@app.command()
def optimize(
    config: ConfigFile,
    set_: Sets = None,
    data: TaskFolder = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the run's folder.")] = False,
    quiet: Quiet = False,
    json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout instead of a progress bar.")] = False,
) -> None:
    """Optimise a prompt; the result is in runs/NAME/prompt.safetensors."""
    from embedgrad.commands.optimize import run

    raise typer.Exit(run(config, set_ or [], data, resume, quiet, json))


@app.command()
def evaluate(
    prompt: PromptFile,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Examples, one JSON object a line; or the task's folder.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model folder, .gguf file or hub id; default: --config's.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Take test data, labels and grader from a configuration.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Take the test data of a task, such as imdb.")] = None,
    grader: Annotated[str | None, typer.Option(help="What makes an answer right: exact, label, math, boxed.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="One of the answers there are; repeat for each.")] = None,
    before: Annotated[bool, typer.Option("--before", help="Also evaluate the prompt as it was at the start.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many examples.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the figures to this JSON file.")] = None,
    query_field: QueryField = "query",
    target_field: Annotated[str, typer.Option(help="Field that holds the expected answer.")] = "target",
    max_new_tokens: MaxNewTokens = None,
    dtype: DType = None,
    backend: Backend = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure a prompt on examples: how often its answers are exactly right."""
    from embedgrad.commands.evaluate import Options, run

    options = Options(
        data, config, task, label or (), grader, before, limit, output, query_field, target_field, max_new_tokens, json
    )
    run(prompt, model, (dtype, backend, device), options)


@app.command()
def compare(
    config: ConfigFile,
    set_: Sets = None,
    data: TaskFolder = None,
    quiet: Quiet = False,
    json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout instead of a table.")] = False,
) -> None:
    """The optimised prompt beside its controls on the same test items; run again, it goes on where it stopped."""
    from embedgrad.commands.compare import run

    raise typer.Exit(run(config, set_ or [], data, quiet, json))


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="similarity, curves, entropy, drift, tau, prompt-quality, or all.")],
    config: ConfigFile,
    set_: Sets = None,
    data: TaskFolder = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for data, pictures and words.")] = None,
) -> None:
    """Answer a question of the paper by runs: data, a picture, and what was seen; shares its runs with `compare`."""
    from embedgrad.commands.study import run

    raise typer.Exit(run(name, config, set_ or [], data, output))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, such as runs/NAME.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page; default: RUN/report.html. A .md twin goes beside it."),
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Test examples of each kind that are shown.")] = 5,
) -> None:
    """Make a page of what runs came to: one HTML file that needs no network, and the same as Markdown."""
    from embedgrad.commands.report import run

    run(runs, output, examples)


@app.command()
def generate(
    prompt: PromptFile,
    model: ModelPath,
    query: Annotated[list[str] | None, typer.Option("--query", help="A query; may be repeated.")] = None,
    input: Annotated[
        Path | None, typer.Option("--input", "-i", help="Queries: JSON lines (.jsonl), or one a line.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the answers to it as JSON lines.")
    ] = None,
    query_field: QueryField = "query",
    max_new_tokens: MaxNewTokens = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the so many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Least share of the likeliest's probability.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text at which an answer ends; may be repeated.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option("--choice", help="A text that the answer may be; may be repeated.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens already seen become less likely.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted from the logits of tokens already seen.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, once per sight.")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries answered together.")] = 32,
    dtype: DType = None,
    weights: Weights = "auto",
    backend: Backend = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Answer queries with a prompt: given ones, those of a file or of stdin, or a conversation at the terminal."""
    from embedgrad.commands.generate import Options, run

    sampling = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed,
        "stop": tuple(stop or ()), "choices": tuple(choice or ()), "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty,
        **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}),
    }  # fmt: skip
    options = Options(query or [], input, output, query_field, batch_size, json, sampling)
    run(lambda: _model(model, dtype, backend, device, weights), prompt, options)


@app.command()
def show(
    prompt: PromptFile,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Its model, for tokens and nearest vocabulary tokens.")
    ] = None,
    json: Json = False,
) -> None:
    """What is in a prompt file: text, template, similarity per token, nearest token of the vocabulary per row."""
    from embedgrad.commands.show import run

    run(prompt, _model(model, None, "auto", "cpu") if model is not None else None, json)


@app.command()
def doctor(json: Json = False) -> None:
    """Machine, versions, backends, and a check of the gradient on a tiny model."""
    from embedgrad.doctor import run

    raise typer.Exit(run(json))


def _model(  # type: ignore[no-untyped-def]
    path: str, dtype: str | None, backend: str, device: str, weights: str = "auto"
):
    from embedgrad.commands.shared import open_model

    return open_model(path, dtype, backend, device, weights)


def main() -> None:
    """Entry point of the `embedgrad` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # an answer that the terminal's encoding cannot show is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a full disk can still be reported
    except EmbedGradError as refusal:
        print(f"embedgrad: {refusal}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # of stdout: all other files are written and read with a refusal of their own
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's own last flush succeeds
        print(f"embedgrad: the output cannot be written: {error.strerror or error}.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
