"""What is each omission of the design worth, in time and memory?

Each omission is switched off in turn, at three shapes: a prompt before its queries, a short prompt before long queries,
and a prompt behind its query (user turn; the question is prefix, and the examples share only the chat's header). The
gradient stays the same: the tests show it, and this question compares its norm. Times come from one process, in which
all omissions take turns behind a turn that does not count, because two processes with the same work differ by up to a
tenth. Memory is the peak of a first step, in a process for each omission. Policy `all`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from bench.harness.arguments import add_machine, positive
from bench.harness.clock import device
from bench.harness.contenders import Case, load, our_version, task
from bench.harness.markdown import table
from bench.harness.rows import Row, row
from bench.harness.worker import serve, workers

CHECKS = ("tests/engine/test_gradient.py::test_what_is_left_out_changes_nothing",)
OMISSIONS = {
    "prefix_copies": "copies of what examples share",
    "prefix_steps": "states before the prompt, after the first step",
    "last_layer": "the last layer at tokens that predict no target",
    "first_layer": "the first layer's backward at tokens that show no prompt",
    "whole_logits": "the whole logit matrix at once",
}
SHAPES = {"prompt first": Case(64, 32, 4), "long query": Case(16, 96, 4), "prompt last": Case(32, 96, 4)}
NOTHING = "nothing"
FORMER = {"trunk_copies": "prefix_copies", "kept_tokens": "prefix_steps"}  # contenders' names in older rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    parser.add_argument("--repeats", type=positive, default=2, help="steps that count (default 2)")
    add_machine(parser, backend=True)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> list[Row]:
    """Measure; the rows."""
    where = device(args.device)
    if args.worker:
        _work(args.backend, where)
        return []
    names = (NOTHING, *OMISSIONS)
    peaks: dict[tuple[str, str], int] = {}
    answers: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    options = ("--worker", "--backend", args.backend, "--device", args.device)
    shapes = list(SHAPES)[-1:] if args.quick else list(SHAPES)
    with workers("ablation", dict.fromkeys(names, options), args.threads) as running:
        for shape in shapes:
            for name, worker in running.items():
                peaks[shape, name] = worker.ask(shape=shape, omission=name)["peak_bytes"]
        timer = running[NOTHING]  # after all peaks: steps without an omission leave more memory behind
        for shape in shapes:
            for name in names:  # the turn that does not count
                timer.ask(shape=shape, omission=name)
            for turn in range(1 if args.quick else args.repeats):
                for name in reversed(names) if turn % 2 else names:  # nobody always follows the same neighbour
                    answers[shape, name].append(timer.ask(shape=shape, omission=name))
            times = {name: statistics.median(step["seconds"] for step in answers[shape, name]) for name in names}
            print(f"{shape}: " + ", ".join(f"{name} {spent:.2f} s" for name, spent in times.items()), flush=True)
    rows = []
    for (shape, name), steps in answers.items():
        truth = answers[shape, NOTHING][-1]["gradient_norm"]
        if abs(steps[-1]["gradient_norm"] - truth) > 1e-3 * truth and args.device == "cpu":
            raise SystemExit(f"without the omission {name} the gradient is another one at {shape}: no figure.")
        rows.append(row(
            "ablation", name, timer.ready["version"], [step["seconds"] for step in steps],
            case={"shape": shape, **vars(SHAPES[shape]), "threads": args.threads, "device": args.device},
            peak_bytes=peaks[shape, name], gradient_norm=steps[-1]["gradient_norm"],
        ))  # fmt: skip
    return rows


def _work(backend: str, where: torch.device) -> None:
    import embedgrad
    from bench.harness import resident
    from embedgrad.engine.gradient import _Omit
    from embedgrad.tasks import smollm2

    model = load(smollm2.path(), where, backend=backend, weights="compute")
    base = resident.used(where)
    prepared: dict[str, Any] = {}

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        shape, name = request["shape"], request["omission"]
        omit = _Omit(**({} if name == NOTHING else {name: False}))
        if shape not in prepared:
            prepared.clear()
            model.release_memory()
            resident.used(where)
            prepared[shape] = _prompt_last(model) if shape == "prompt last" else task(model, SHAPES[shape])
        soft, examples = prepared[shape]
        resident.forget_peak(where)
        started = time.perf_counter()
        loss, grad = embedgrad.loss_and_grad(model, soft, examples, policy="all", _omit=omit)
        norm = float(grad.norm())
        return {"seconds": time.perf_counter() - started, "peak_bytes": resident.peak(where) - base,
                "loss": loss, "gradient_norm": norm}  # fmt: skip

    serve({"version": our_version(model)}, measure)


def _prompt_last(model: Any) -> tuple[Any, list[Any]]:
    """The same tokens in a chat whose prompt stands behind the query."""
    import embedgrad

    soft, examples = task(model, SHAPES["prompt last"])
    template = embedgrad.Template.chat([{"role": "user", "content": "{query}\n{prompt}"}])
    return embedgrad.SoftPrompt.from_ids(model, soft.token_ids, template=template), examples


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _by_shape(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for one in rows:
        found[str(one.case["shape"])][FORMER.get(one.contender, one.contender)] = one
    return found


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`ablation`: time and memory without each omission, as multiples of what the whole design takes."""
    found = _by_shape(rows)
    heads = ["computed after all"]
    for shape, named in found.items():
        heads += [f"{shape}, {Case.of(named[NOTHING])}: time", "memory"]
    cells: list[list[object]] = [[NOTHING]]
    for named in found.values():
        cells[0] += [f"{named[NOTHING].median:.2f} s", f"{(named[NOTHING].peak_bytes or 0) / 1e6:.0f} MB"]
    for name, told in OMISSIONS.items():
        line: list[object] = [told]
        for named in found.values():
            one, whole = named[name], named[NOTHING]
            line += [f"{one.median / whole.median:.2f}×", f"{(one.peak_bytes or 0) / (whole.peak_bytes or 1):.2f}×"]
        cells.append(line)
    return {"ablation": table(heads, cells)}


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """Time without each omission."""
    import matplotlib.pyplot as plt

    from bench.harness import pictures as draw

    found = _by_shape(rows)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axes, label, value in (
        (panels[0], "time, multiples of the whole design's", lambda one: one.median),
        (panels[1], "peak memory, multiples", lambda one: float(one.peak_bytes or 0)),
    ):
        series = [
            (shape, fill, [value(named[name]) / value(named[NOTHING]) for name in OMISSIONS])
            for (shape, named), fill in zip(found.items(), draw.THREE, strict=False)
        ]
        draw.grouped_bars(axes, series, flat=True, numbers="%.2f")
        axes.axvline(1, color=draw.LIMIT, linewidth=1)
        axes.set_xlabel(label)
    panels[0].set_yticks(range(len(OMISSIONS)), OMISSIONS.values(), fontsize=8)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=8)
    return {"ablation": figure}
