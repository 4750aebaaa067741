"""Does the faster or smaller path change the outcome?

The demo's task (movie-review snippets, SmolLM2-135M-Instruct), shortened, is optimised with the same seed on weights in
float32, in bfloat16, and as stored in Q4_1 blocks. The table has the accuracy on the same held-out snippets before and
after, with 95 % Wilson intervals, the similarity, and the steps. The memory policies must do more: after three steps
all must have given the same bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from bench.harness.arguments import add_machine
from bench.harness.contenders import our_version
from bench.harness.markdown import table
from bench.harness.rows import Row, row

CHECKS = ("tests/engine/test_gradient.py::test_policies_and_repetition_give_the_same_bits",)
WEIGHTS = {"fp32": "float32", "bf16": "bfloat16", "stored": "Q4_1 as stored"}
POLICIES = ("all", "mlp", "layer")
SIZES = {"train": 1000, "validation": 40, "test": 80}
STEPS, BATCH, RATE, SEED = 10, 8, 4e-3, 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each optimisation (default {STEPS})")
    add_machine(parser, device=False)


def main(args: argparse.Namespace) -> list[Row]:
    """Optimise; the rows."""
    import torch

    import embedgrad
    from embedgrad.data.splitting import split
    from embedgrad.tasks import movie_snippets, smollm2
    from embedgrad.train.settings import OptimizeConfig

    torch.set_num_threads(args.threads)
    sizes = {**SIZES, "test": 60} if args.quick else SIZES
    parts = split(movie_snippets.load(), sizes, seed=SEED)
    rows = []
    for weights in ("fp32", "stored") if args.quick else WEIGHTS:
        model = embedgrad.load_model(smollm2.path(), weights=weights)
        prompt = embedgrad.SoftPrompt.from_text(model, movie_snippets.PROMPT)
        steps = 4 if args.quick else args.steps
        config = OptimizeConfig(steps=steps, batch_size=BATCH, learning_rate=RATE, validate_every=steps, seed=SEED)
        before = embedgrad.evaluate(model, prompt, parts["test"], movie_snippets.LABELS)
        started = time.perf_counter()
        result = embedgrad.optimize(model, prompt, parts["train"], parts["validation"], config)
        spent = time.perf_counter() - started
        after = embedgrad.evaluate(model, result.prompt, parts["test"], movie_snippets.LABELS)
        rows.append(row(
            "quality", weights, our_version(model), [spent],
            case={"weights": weights, "threads": args.threads, **sizes},
            before=_accuracies(before), after=_accuracies(after), min_similarity=result.min_similarity,
            steps=result.steps, best_step=result.best_step, final_loss=result.history[-1]["loss"],
            stored_bytes=sum(x.nbytes for x in model.weights.tensors()),
        ))  # fmt: skip
        print(
            f"{weights}: generated {before.generated_accuracy.value:.1%} -> {after.generated_accuracy.value:.1%}",
            flush=True,
        )
        if weights == "fp32":
            rows += _policies(model, prompt, parts["train"], config, args.threads)
    return rows


def _policies(model: Any, prompt: Any, train: Sequence[Any], config: Any, threads: int) -> list[Row]:
    import embedgrad
    from embedgrad.train.checkpoints import tensor_hash

    rows, hashes = [], set()
    for policy in POLICIES:
        short = config.model_copy(update={"steps": 3, "memory_policy": policy, "validate_every": None})
        started = time.perf_counter()
        result = embedgrad.optimize(model, prompt, train, None, short)
        hashes.add(tensor_hash(result.last_prompt.embeddings))
        rows.append(row(
            "quality", f"policy {policy}", our_version(model), [time.perf_counter() - started],
            case={"weights": "fp32", "threads": threads, "steps": 3},
            embeddings=tensor_hash(result.last_prompt.embeddings),
        ))  # fmt: skip
    if len(hashes) != 1:
        raise SystemExit("the memory policies do not give the same bits: no figure counts.")
    return rows


def _accuracies(found: Any) -> dict[str, Any]:
    return {"generated": vars(found.generated_accuracy), "choice": vars(found.choice_accuracy)}


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _share(found: dict[str, Any]) -> str:
    return f"{found['value']:.1%} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`quality`: before and after, by the form of the weights."""
    heads = ("weights", "MB", "generated, before", "after", "likelier label, before", "after", "least similarity",
             "steps (best)", "seconds")  # fmt: skip
    cells = [
        (
            WEIGHTS[one.contender], f"{one.more['stored_bytes'] / 1e6:.0f}",
            *(_share(one.more[when][kind]) for kind in ("generated", "choice") for when in ("before", "after")),
            f"{one.more['min_similarity']:.3f}", f"{one.more['steps']} ({one.more['best_step']})", f"{one.median:.0f}",
        )
        for one in rows
        if one.contender in WEIGHTS
    ]  # fmt: skip
    policies = [one for one in rows if one.contender.startswith("policy")]
    same = "the same bits" if len({one.more["embeddings"] for one in policies}) == 1 else "DIFFERENT BITS"
    told = ", ".join(f"`{one.contender.split()[1]}` in {one.median:.1f} s" for one in policies)
    return {"quality": f"{table(heads, cells)}\n\nThree steps with each memory policy give {same}: {told}."}


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracy before and after with its intervals."""
    import matplotlib.pyplot as plt

    from bench.harness import pictures as draw

    found = [one for one in rows if one.contender in WEIGHTS]
    figure, axes = plt.subplots(figsize=(6.4, 3))
    series, errors = [], []
    for when, kind, fill in (
        ("before", "generated", draw.OTHER_TOO), ("after", "generated", draw.OURS),
        ("before", "choice", draw.OTHER), ("after", "choice", draw.OURS_TOO),
    ):  # fmt: skip
        value, low, high = ([100 * one.more[when][kind][key] for one in found] for key in ("value", "low", "high"))
        label = f"{'answer as generated' if kind == 'generated' else 'likelier label'}, {when}"
        series.append((label, fill, value))
        errors.append([[a - b for a, b in zip(*pair, strict=True)] for pair in ((value, low), (high, value))])
    draw.grouped_bars(axes, series, yerr=errors, capsize=[2] * len(series))
    axes.set_xticks(range(len(found)), [WEIGHTS[one.contender] for one in found])
    axes.set_ylabel("% correct")
    axes.set_ylim(0, 100)
    axes.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return {"quality": figure}
