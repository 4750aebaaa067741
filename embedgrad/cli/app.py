"""The command line: `embedgrad optimize | evaluate | compare | study | report | generate | show | export | ...`.

This module only declares the options. A command's modules are imported when it runs, so `--help` is fast. Exit codes: 0
success, 2 an error of the package (one sentence on stderr), 130 stopped by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import embedgrad.util.openmp  # noqa: F401
from embedgrad.util.errors import EmbedGradError, ToldElsewhere

app = typer.Typer(
    name="embedgrad",
    help="Tune a prompt's embeddings against a frozen language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PromptFile = Annotated[Path, typer.Argument(help="A prompt file, such as runs/NAME/prompt.safetensors.")]
ModelPath = Annotated[str, typer.Option("--model", "-m", help="Model folder, .gguf file or hub id.")]
DType = Annotated[str | None, typer.Option(help="Compute type: float32, float64, bfloat16.")]
Weights = Annotated[str, typer.Option(help="Form of the matrices: auto, compute, stored, fp32, bf16, int8, int4.")]
Backend = Annotated[str, typer.Option(help="The kernels: auto, or a backend that `doctor` lists.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
LongContext = Annotated[bool, typer.Option("--long-context", help="LongRoPE's rotations for long texts (Phi).")]
QueryField = Annotated[str, typer.Option(help="Field of the JSON lines that holds the query.")]
ConfigFile = Annotated[Path, typer.Argument(help="Configuration file (YAML).")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override one setting: section.key=value; may be repeated.")
]
TaskFolder = Annotated[
    Path | None, typer.Option("--data", "-d", help="Folder with the task's data; default: EMBEDGRAD_DATA.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of text for people.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")]


@app.command()
def optimize(
    config: ConfigFile,
    set_: Sets = None,
    data: TaskFolder = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in the run folder.")] = False,
    allow_other_bits: Annotated[
        bool, typer.Option(help="Resume although backend, device, threads or torch changed, which changes the bits.")
    ] = False,
    quiet: Quiet = False,
    json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout instead of a progress bar.")] = False,
) -> None:
    """Optimise a prompt; the result is in runs/NAME/prompt.safetensors."""
    from embedgrad.cli.commands.optimize import run

    raise typer.Exit(run(config, set_ or [], data, resume, quiet, json, allow_other_bits))


@app.command()
def evaluate(
    prompt: PromptFile,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Examples, one JSON object per line; or the task's folder.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model folder, .gguf file or hub id; default: --config's.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Take test data, labels and grader from a configuration.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Take the test data of a task, such as imdb.")] = None,
    grader: Annotated[str | None, typer.Option(help="What makes an answer right: exact, label, math, boxed.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="A possible answer; repeat for each.")] = None,
    before: Annotated[bool, typer.Option("--before", help="Also evaluate the prompt as it was at the start.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first LIMIT examples.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the figures to this JSON file.")] = None,
    query_field: QueryField = "query",
    target_field: Annotated[str, typer.Option(help="Field that holds the expected answer.")] = "target",
    max_new_tokens: MaxNewTokens = None,
    dtype: DType = None,
    backend: Backend = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure how often a prompt's answers to examples are right."""
    from embedgrad.cli.commands.evaluate import Options, run

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
    """Compare the optimised prompt with its controls on the same test items. Run it again to continue."""
    from embedgrad.cli.commands.compare import run

    raise typer.Exit(run(config, set_ or [], data, quiet, json))


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="similarity, curves, entropy, drift, tau, prompt-quality, or all.")],
    config: ConfigFile,
    set_: Sets = None,
    data: TaskFolder = None,
    start: Annotated[
        list[str] | None,
        typer.Option(help="prompt-quality: a start beside the good one; default: all. May be repeated."),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="prompt-quality: an arm beside 'cone 0.95'; default: all. May be repeated."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="With all: prompt-quality with every seed, not the first one only.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for data, pictures and texts.")] = None,
) -> None:
    """Answer a question of the paper by runs, with data, a picture and a paragraph. Shares its runs with `compare`."""
    from embedgrad.cli.commands.study import Chosen, run

    raise typer.Exit(run(name, config, set_ or [], data, output, Chosen(start or (), arm or (), full)))


@app.command()
def sweep(
    config: ConfigFile,
    set_: Sets = None,
    data: TaskFolder = None,
    together: Annotated[int, typer.Option(min=1, help="Trials that take their steps in one pass.")] = 1,
    quiet: Quiet = False,
) -> None:
    """Search settings by many runs, and test the best. Run it again to continue; run it twice for two workers."""
    from embedgrad.cli.commands.sweep import run

    raise typer.Exit(run(config, set_ or [], data, quiet, together))


@app.command()
def distil(
    prompt: PromptFile,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Configuration with model and data; default: the run's own.")
    ] = None,
    set_: Sets = None,
    data: TaskFolder = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", help="nearest, words, induced, gcg, gcg-fluent, pez, pez-fluent; default: all."),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Tokens to spend; default: 400 scorings of a text on the validation data.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score texts on the first LIMIT validation items; default: on all.")
    ] = None,
    from_best: Annotated[
        bool, typer.Option(help="Search from the best candidate too, not from the original text alone.")
    ] = True,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each request for words or an instruction.")] = 8,
    longest: Annotated[int, typer.Option(min=1, help="Longest text that the model writes, in tokens.")] = 96,
    seed: Annotated[int, typer.Option(min=0, help="Seed of samples and searches.")] = 0,
    top: Annotated[int, typer.Option(min=1, help="Best texts that are tried on the test data.")] = 3,
    judge: Annotated[
        str | None,
        typer.Option(help="Another model, only asked: a path, or an OpenAI-compatible address such as http://host/v1."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The model's name at the address.")] = None,
    judge_texts: Annotated[int, typer.Option(min=1, help="Texts that the judge is asked about.")] = 20,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request to an address.")] = 60.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the results; default: distil/ beside the prompt.")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Find plain texts that keep a tuned prompt's gain, for models that take text only. Run it again to continue."""
    from embedgrad.cli.commands.distil import Options, run
    from embedgrad.distil.distil import SOURCES, Settings

    sources = tuple(source or SOURCES)
    settings = Settings(sources, samples, budget, seed, top, longest, judged=judge_texts, from_best=from_best)
    options = Options(config, set_ or [], data, judge, judge_model, timeout, limit, output, quiet, json)
    raise typer.Exit(run(prompt, options, settings))


@app.command()
def transfer(
    prompt: PromptFile,
    to: Annotated[str, typer.Option("--to", help="The other model: a folder, .gguf file or hub id.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Configuration with model and data; default: the run's own.")
    ] = None,
    set_: Sets = None,
    data: TaskFolder = None,
    translator: Annotated[
        list[str] | None, typer.Option("--translator", help="ridge, orthogonal, relative; default: all three.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps on the other model; default: the configuration's.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use the first LIMIT validation and test items; default: all.")
    ] = None,
    accuracy: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Validation accuracy whose steps are counted; default: parts of the way."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the results; default: transfer-MODEL/ beside the prompt."),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Translate a tuned prompt to another model and measure it there. Run it again to continue."""
    from embedgrad.cli.commands.transfer import Options, run
    from embedgrad.transfer.translators import NAMES

    chosen = tuple(dict.fromkeys(translator or NAMES))
    options = Options(config, set_ or [], data, chosen, steps, accuracy, limit, output, quiet, json)
    raise typer.Exit(run(prompt, to, options))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, such as runs/NAME.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page; default: RUN/report.html. A .md twin goes beside it."),
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Test examples of each kind that are shown.")] = 5,
) -> None:
    """Write a report on runs: one HTML file that needs no network, and the same as Markdown."""
    from embedgrad.cli.commands.report import run

    run(runs, output, examples)


@app.command()
def generate(
    prompt: PromptFile,
    model: ModelPath,
    query: Annotated[list[str] | None, typer.Option("--query", help="A query; may be repeated.")] = None,
    input: Annotated[
        Path | None, typer.Option("--input", "-i", help="Queries: JSON lines (.jsonl), or one per line.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the answers to this file as JSON lines.")
    ] = None,
    query_field: QueryField = "query",
    max_new_tokens: MaxNewTokens = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the TOP_K likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Total probability of the likeliest tokens.")] = 1.0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Least probability, relative to the largest.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text at which an answer ends; may be repeated.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option("--choice", help="A text that the answer may be; may be repeated.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens already seen become less likely.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted from the logits of tokens already seen.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Subtracted once for each occurrence of a token.")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries that are answered together.")] = 32,
    dtype: DType = None,
    weights: Weights = "auto",
    backend: Backend = "auto",
    device: Device = "auto",
    long_context: LongContext = False,
    json: Json = False,
) -> None:
    """Answer queries with a prompt. They come from --query, a file, stdin or a conversation at the terminal."""
    from embedgrad.cli.commands.generate import Options, run

    sampling = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed,
        "stop": tuple(stop or ()), "choices": tuple(choice or ()), "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty,
        **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}),
    }  # fmt: skip
    options = Options(query or [], input, output, query_field, batch_size, json, sampling)
    run(lambda: _model(model, dtype, backend, device, weights, long_context), prompt, options)


@app.command()
def show(
    prompt: PromptFile,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Its model, for tokens and nearest vocabulary tokens.")
    ] = None,
    json: Json = False,
) -> None:
    """Show a prompt file: text, template, similarity of each token, nearest token of the vocabulary."""
    from embedgrad.cli.commands.show import run

    run(prompt, _model(model, None, "auto", "cpu") if model is not None else None, json)


@app.command()
def export(
    prompts: Annotated[list[Path], typer.Argument(help="Prompt files; the first is the default of several.")],
    to: Annotated[str, typer.Option("--to", help="hf, gguf, ollama, peft or vllm.")],
    model: ModelPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="What is written: a new folder, for gguf a new file.")],
    name: Annotated[
        list[str] | None, typer.Option("--name", help="The prompt's name; repeat for each. Default: the file's.")
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="A head of its own, for engines that ignore suppressed tokens.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Accept a fine-tune of the prompt's model.")] = False,
    check: Annotated[
        bool | None,
        typer.Option("--check/--no-check", help="Compare with our engine in the target's program."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights where a .gguf file becomes a folder: float32, bfloat16, float16.")
    ] = "float32",
    json: Json = False,
) -> None:
    """Write tuned prompts for transformers, vLLM, SGLang, MLX, llama.cpp, Ollama or PEFT."""
    from embedgrad.cli.commands.export import run

    run(prompts, to, model, out, json, names=name or (), untie=untie, force=force, check=check, dtype=dtype)


@app.command("import")
def import_(
    adapter: Annotated[Path, typer.Argument(help="Folder of a PEFT prompt-tuning adapter.")],
    model: ModelPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="The prompt file that is written.")],
    place: Annotated[
        str, typer.Option(help="template: in the system turn; front: before the whole conversation, as PEFT has it.")
    ] = "template",
    json: Json = False,
) -> None:
    """Make a starting prompt of a PEFT prompt-tuning adapter."""
    from embedgrad.cli.commands.import_ import run

    run(adapter, model, out, place, json)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Model folder, .gguf file or hub id.")],
    prompts: Annotated[list[Path] | None, typer.Argument(help="Prompt files; each is a model for clients.")] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="The prompt's name; repeat for each. Default: the file's.")
    ] = None,
    bare_name: Annotated[str | None, typer.Option(help="Name of the model without a prompt; default: its own.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(help="A key that clients must send; repeat for each. Also EMBEDGRAD_API_KEY.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Answers that are written at the same time.")] = 32,
    context: Annotated[int | None, typer.Option(min=2, help="Most tokens of a request with its answer.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Answers that may wait; others are refused (429).")] = 256,
    max_body: Annotated[int, typer.Option(min=1, help="Longest body of a request, in bytes.")] = 1 << 20,
    dtype: DType = None,
    backend: Backend = "auto",
    device: Device = "auto",
    weights: Weights = "auto",
    long_context: LongContext = False,
) -> None:
    """Serve prompts, and the model without one, to clients of the OpenAI API."""
    from embedgrad.cli.commands.serve import run

    options = {
        "host": host, "port": port, "slots": slots, "context": context, "max_tokens": max_tokens,
        "max_waiting": max_waiting, "max_body": max_body,
    }  # fmt: skip
    open_model = lambda: _model(model, dtype, backend, device, weights, long_context)  # noqa: E731
    run(open_model, prompts or [], name or (), bare_name, api_key or (), options)


@app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness on this engine: --model_args model=MODEL,prompt=FILE --tasks TASK, and its options."""
    from embedgrad.cli.commands.lm_eval import run

    run(context.args)


@app.command()
def doctor(
    device: Annotated[
        str | None, typer.Option(help="Only this device; for cuda, its launch parameters are checked as well.")
    ] = None,
    json: Json = False,
) -> None:
    """Show machine, compilers and backends, check the gradient on a tiny model, and with --device cuda the kernels."""
    from embedgrad.cli.doctor import run

    raise typer.Exit(run(json, device))


def _model(  # type: ignore[no-untyped-def]
    path: str, dtype: str | None, backend: str, device: str, weights: str = "auto", long_context: bool = False
):
    from embedgrad.cli.commands.shared import open_model

    return open_model(path, dtype, backend, device, weights, long_context=long_context)


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    """Prints a warning as people read it, without the line of code that gave it."""
    print(f"embedgrad: note: {message}", file=sys.stderr)


def main() -> None:
    """Entry point of the `embedgrad` command."""
    warnings.showwarning = _one_line
    if isinstance(sys.stdout, io.TextIOWrapper):  # else characters that its encoding lacks would raise errors
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # Python's own flush at exit comes too late to report a full disk
    except ToldElsewhere:  # by another process of the same task
        _refuse()
    except EmbedGradError as refusal:
        print(f"embedgrad: {refusal}", file=sys.stderr)
        _refuse()
    except OSError as error:  # from stdout; errors of all other files are EmbedGradErrors
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # lets Python's flush at exit succeed
        print(f"embedgrad: the output cannot be written: {error.strerror or error}.", file=sys.stderr)
        sys.exit(2)


def _refuse() -> NoReturn:
    """Ends with code 2. Among several processes at once: threads that wait for the others would abort it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(2)
    sys.exit(2)


if __name__ == "__main__":
    main()
