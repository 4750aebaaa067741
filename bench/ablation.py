"""What is each omission of the design worth, in time and memory?

Each is switched off in turn, at three shapes: a prompt before its queries, a short prompt before long queries, and a
prompt behind its query (user turn, where the question is kept and the examples share no more than the chat's header).
The gradient stays the same (the tests show it, and the bench looks at its norm). Times are of one process, where all
omissions take turns behind a turn that does not count, for two processes with the same work differ by up to a tenth;
memory is the peak of a first step, in a process per omission. Policy `all`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bench.contenders import Case, load, our_version, task
from bench.markdown import table
from bench.rows import Row, row
from bench.worker import Worker, serve

CHECKS = ("tests/engine/test_gradient.py::test_what_is_left_out_changes_nothing",)
OMISSIONS = {
    "trunk_copies": "copies of what examples share",
    "kept_tokens": "states before the prompt, after the first step",
    "last_layer": "the last layer at tokens that predict no target",
    "first_layer": "the first layer's backward at tokens that show no prompt",
    "whole_logits": "the whole logit matrix at once",
}
SHAPES = {"prompt first": Case(64, 32, 4), "long query": Case(16, 96, 4), "prompt last": Case(32, 96, 4)}
NOTHING = "nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--repeats", type=int, default=2, help="steps that count (default 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--backend", default="auto", help="of embedgrad (default auto)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> list[Row]:
    """Measure; the rows."""
    from bench.clock import device

    device(args.device)
    if args.worker:
        _work(args.backend, args.device)
        return []
    names = (NOTHING, *OMISSIONS)
    peaks: dict[tuple[str, str], int] = {}
    answers: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    options = ("--backend", args.backend, "--device", args.device)
    shapes = list(SHAPES)[-1:] if args.quick else list(SHAPES)
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker("ablation", "--worker", *options, threads=args.threads)) for name in names
        }
        for shape in shapes:
            for name, worker in workers.items():
                peaks[shape, name] = worker.ask(shape=shape, omission=name)["peak_bytes"]
        timer = workers[NOTHING]  # only now, for steps without an omission leave more memory behind
        for shape in shapes:
            for name in names:  # brings in what is done once
                timer.ask(shape=shape, omission=name)
            for turn in range(1 if args.quick else args.repeats):
                for name in reversed(names) if turn % 2 else names:  # no one is always behind the same neighbour
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


def _work(backend: str, device: str) -> None:
    import torch

    import embedgrad
    from bench import resident
    from embedgrad.gradient import _Omit

    where = torch.device(device)
    model = load(where, backend=backend, weights="compute")
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
        found[str(one.case["shape"])][one.contender] = one
    return found


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`ablation`: time and memory without each omission, as multiples of what the whole design takes."""
    found = _by_shape(rows)
    heads = ["computed after all"]
    for shape, named in found.items():
        heads += [
            f"{shape}, {Case(*(int(named[NOTHING].case[k]) for k in ('prompt', 'query', 'batch')))}: time",
            "memory",
        ]
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

    from bench import style

    found = _by_shape(rows)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    height = 0.8 / len(found)
    for axes, label, value in (
        (panels[0], "time, multiples of the whole design's", lambda one: one.median),
        (panels[1], "peak memory, multiples", lambda one: float(one.peak_bytes or 0)),
    ):
        for place, (shape, named) in enumerate(found.items()):
            at = [i + (place - (len(found) - 1) / 2) * height for i in range(len(OMISSIONS))]
            bars = axes.barh(at, [value(named[n]) / value(named[NOTHING]) for n in OMISSIONS], height * 0.9,
                             color=(style.OURS, style.OURS_TOO, style.OURS_THREE)[place], label=shape)  # fmt: skip
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axes.axvline(1, color=style.LIMIT, linewidth=1)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(OMISSIONS)), OMISSIONS.values(), fontsize=8)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=8)
    return {"ablation": figure}
