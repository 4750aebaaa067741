"""`make demo`: optimises a real prompt on a real model and real data, and reports the accuracy before and after.

SmolLM2-135M-Instruct classifies movie-review snippets. The prompt is the system turn. Its embeddings are optimised on
training snippets, and the best state is chosen on validation snippets. Then both prompts are evaluated on test snippets
that were not used before. All results are in runs/demo/.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import embedgrad.util.openmp  # noqa: F401
from embedgrad.cli.commands.shared import figures, write_text
from embedgrad.cli.progress import Bar
from embedgrad.engine.model import load_model
from embedgrad.evaluation.evaluate import Accuracy, Evaluation, evaluate
from embedgrad.evaluation.grading.labels import Exact
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.tasks import movie_snippets, smollm2
from embedgrad.tasks.parts import Division, divide
from embedgrad.tasks.source import Source
from embedgrad.train.monitors import Judge
from embedgrad.train.optimize import OptimizeResult, optimize
from embedgrad.train.run_folder import read_summary, write_summary
from embedgrad.train.settings import OptimizeConfig
from embedgrad.util.errors import EmbedGradError
from embedgrad.util.host import peak_memory

FOLDER = Path("runs/demo")
SEED = 0
TASK = movie_snippets.TASK
CONFIG = OptimizeConfig(seed=SEED, **TASK.optimize)


def main() -> int:
    """Runs the demo. Returns the exit code."""
    console = Console()
    started = time.perf_counter()
    model = load_model(smollm2.path())
    parts = divide(TASK, TASK.load(Source(None), None), Division(seed=SEED))
    prompt = SoftPrompt.from_text(model, TASK.prompt)
    console.print(f"model   {model.name}\nprompt  {prompt.text!r}, {len(prompt.token_ids)} tokens, system turn")
    console.print(f"data    movie-review snippets; {parts.leakage.sentence()}\n")

    before = evaluate(model, prompt, parts.test, TASK.labels)
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    judge = Judge(Exact(movie_snippets.LABELS))
    result = optimize(model, prompt, parts.train, parts.validation, CONFIG, run_dir=FOLDER, progress=Bar(), judge=judge)
    after = evaluate(model, result.prompt, parts.test, TASK.labels)

    report(console, before, after, result)
    tested = {"before": before, "after": after}
    content = {when: evaluation.to_dict() for when, evaluation in tested.items()}
    write_text(FOLDER / "test.json", json.dumps(content, ensure_ascii=False) + "\n")
    about = {"task": TASK.name, "leakage": parts.leakage.to_dict(), "peak_memory_bytes": peak_memory()}
    about |= {"seed": SEED, "total_seconds": time.perf_counter() - started}
    write_summary(FOLDER, {**read_summary(FOLDER), **figures(tested), **about})
    console.print(f"\nWritten to {FOLDER}/: summary.json, test.json, prompt.safetensors, metrics.jsonl, config.yaml")
    return 0


def report(console: Console, before: Evaluation, after: Evaluation, result: OptimizeResult) -> None:
    """Prints the table of before and after, and a few examples."""
    table = Table(title=f"{len(after.records)} test snippets, 95 % Wilson intervals")
    for heading in ("", "before", "after"):
        table.add_column(heading)
    for label, name in (("answer as generated", "generated_accuracy"), ("more likely label", "choice_accuracy")):
        table.add_row(label, *(_percent(getattr(e, name)) for e in (before, after)))
    console.print()
    console.print(table)
    console.print(
        f"similarity of every prompt token to its own embedding: at least {result.min_similarity:.3f}; "
        f"best of {result.steps} steps: {result.best_step}; {result.train_seconds:.0f} s of training; "
        f"weights {'unchanged' if result.weights_unchanged else 'CHANGED'}"
    )
    shown = [*zip(before.records, after.records, strict=True)]
    chosen = [p for p in shown if p[1].generated_correct][:3] + [p for p in shown if not p[1].generated_correct][:2]
    for old, new in chosen:
        console.print(f"\n[bold]{old.target}[/bold]: {old.query}", highlight=False)
        console.print(f"  before: {old.generated!r}\n  after:  {new.generated!r}", highlight=False)


def _percent(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "-"
    return f"{accuracy.value:6.1%}  [{accuracy.low:.1%}, {accuracy.high:.1%}]"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EmbedGradError as error:
        print(f"embedgrad: {error}", file=sys.stderr)
        sys.exit(2)
