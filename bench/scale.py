"""How do time and memory of a step grow with prompt, query, batch, layers and width, and how large a batch fits?

Random weights in the real shapes of SmolLM2 and Qwen2.5, stored in bfloat16 and computed with in float32, on the native
backend with policy `all`. One quantity grows at a time, from 64/64/2 on SmolLM2-135M's shape; the exponent is the slope
of the logarithms. A least-squares fit over a grid of prompts and batches separates two costs: that of a packed token,
and that of a pair of a query and a prompt token. The second would be a whole token if every query had its own copy of
the prompt. The largest batch within a given memory is extrapolated from the peaks at two batch sizes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bench.harness.arguments import add_machine, positive
from bench.harness.clock import device
from bench.harness.contenders import TITLES, Case, our_step, our_version, tree_of
from bench.harness.markdown import seconds, table
from bench.harness.rows import Row, of_part, row
from bench.harness.worker import Worker, serve

CHECKS = ("tests/engine/test_gradient.py::test_narrow_weights_kept_as_stored_give_the_bits_of_wide_ones",)
BASE = Case(64, 64, 2)
MODEL = "SmolLM2-135M"
AXES: dict[str, tuple[int, ...]] = {
    "prompt": (16, 64, 256), "query": (16, 64, 256), "batch": (1, 2, 8), "layers": (7, 15, 30),
}  # fmt: skip
WIDTHS = ("SmolLM2-135M", "SmolLM2-360M", "Qwen2.5-0.5B", "Qwen2.5-Math-1.5B")
WIDTH_CASE = Case(32, 32, 2)
GRID = tuple(Case(prompt, 32, batch) for prompt in (16, 128) for batch in (1, 4, 8))
FITTED = (Case(64, 64, 2), Case(64, 64, 4))  # their peaks give the largest batch
BUDGETS = (1, 4, 16)  # GB above the loaded model
FITTING = ("peft", "embedgrad", "embedgrad-layer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    parser.add_argument("--repeats", type=positive, default=2, help="steps that count (default 2)")
    add_machine(parser)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> list[Row]:
    """Measure; the rows."""
    if device(args.device).type == "cuda":
        raise SystemExit("bench scale draws its weights for the CPU; on a GPU ask `bench step --device cuda --grid …`.")
    if args.worker:
        serve({}, _Measure())
        return []
    points = [
        (axis, value, Case(**{**vars(BASE), axis: value}))
        for axis, values in AXES.items()
        if axis != "layers"
        for value in (values[::2] if args.quick else values)
    ]
    points.sort(key=lambda point: point[2].prompt + point[2].batch * point[2].query)  # ascending
    with Worker("scale", "--worker", threads=args.threads) as worker:
        rows = [_row(args, worker, "axis", case, axis=axis, value=value) for axis, value, case in points]
        rows += [_row(args, worker, "axis", BASE, layers=n, axis="layers", value=n) for n in AXES["layers"]]
        rows += [_row(args, worker, "grid", case) for case in (() if args.quick else GRID)]
        rows += [_row(args, worker, "width", WIDTH_CASE, model) for model in (WIDTHS[:1] if args.quick else WIDTHS)]
    return rows + ([] if args.quick else _fits(args))


def _row(
    args: argparse.Namespace, worker: Worker, part: str, case: Case, model: str = MODEL, layers: int = 0, **key: Any
) -> Row:
    """The steps of one case, on the first `layers` of a model (0: all)."""
    repeats = 1 if args.quick else args.repeats
    uncounted = 1 if model == MODEL else 0  # a larger model's first step counts too
    answers = [worker.ask(case=str(case), model=model, layers=layers) for _ in range(repeats + uncounted)]
    last = answers[-1]
    found = row(
        "scale", "embedgrad", last["version"], [a["seconds"] for a in answers[-repeats:]],
        case={"part": part, "model": model, "layers": last["layers"], **vars(case), "threads": args.threads, **key},
        peak_bytes=max(a["peak_bytes"] for a in answers), tokens=last["tokens"],
        parameters=last["parameters"], width=last["width"],
    )  # fmt: skip
    print(f"{part} {key or ''} {model} {case}: {seconds(found.median)}", flush=True)
    return found


def _fits(args: argparse.Namespace) -> list[Row]:
    """Peaks of SmolLM2-135M-Instruct itself, in float32, at two batch sizes; in processes of `bench step`."""
    rows = []
    for name in FITTING:
        with Worker("step", "--worker", name, threads=args.threads) as worker:
            for case in FITTED:
                answers = [worker.ask(case=str(case), first=first) for first in (True, False)]
                rows.append(row(
                    "scale", name, worker.ready["version"], [answers[-1]["seconds"]],
                    case={"part": "fit", "model": MODEL, **vars(case), "threads": args.threads},
                    peak_bytes=max(answer["peak_bytes"] for answer in answers),
                ))  # fmt: skip
    return rows


class _Measure:
    """The worker's side; it holds the model of the last request."""

    def __init__(self) -> None:
        self._key: tuple[str, int] | None = None
        self._model: Any = None
        self._base = 0

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        import torch

        from bench.harness import resident
        from bench.harness.models import config_of, random_model

        where = torch.device("cpu")
        key = (request["model"], request["layers"])
        if key != self._key:
            self._model = None
            self._model, self._key = random_model(config_of(key[0], key[1] or None), key[0]), key
            our_step(self._model, Case(4, 4, 1), "all")()
            self._model.release_memory()
            self._base = resident.used(where)
        model, case = self._model, Case.parse(request["case"])
        step = our_step(model, case, "all")
        tokens = tree_of(model, case).num_tokens
        resident.used(where)
        resident.forget_peak(where)
        started = time.perf_counter()
        step()
        spent = time.perf_counter() - started
        config = model.config
        return {
            "seconds": spent, "peak_bytes": resident.peak(where) - self._base, "version": our_version(model),
            "tokens": tokens, "layers": config.num_layers, "width": config.hidden_size,
            "parameters": sum(math.prod(shape) for shape in config.shapes().values()),
        }  # fmt: skip


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _axes(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for one in of_part(rows, "axis"):
        found[str(one.case["axis"])].append(one)
    return {axis: found[axis] for axis in AXES if axis in found}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The least-squares slope of log y over log x."""
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return sum((u - mean_a) * (v - mean_b) for u, v in zip(a, b, strict=True)) / sum((u - mean_a) ** 2 for u in a)


def token_and_pair(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Seconds of a packed token, seconds of a pair of a query and a prompt token, share of the variance explained."""
    import numpy as np

    grid = of_part(rows, "grid")
    design = np.array([[1.0, one.more["tokens"], float(one.case["batch"]) * float(one.case["prompt"])] for one in grid])
    times = np.array([one.median for one in grid])
    solution, *_ = np.linalg.lstsq(design, times, rcond=None)
    left = times - design @ solution
    return float(solution[1]), float(solution[2]), float(1 - left.var() / times.var())


def _values(rows: Sequence[Row], name: str) -> str:
    """The values of the grid, such as "1, 4 and 8"."""
    *others, last = (str(value) for value in sorted({int(one.case[name]) for one in of_part(rows, "grid")}))
    return f"{', '.join(others)} and {last}" if others else last


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`scale`: each axis; `scale-width`: models; `scale-batch`: the largest batch within a given memory."""
    cells: list[Sequence[object]] = []
    for axis, found in _axes(rows).items():
        values = [float(one.case["value"]) for one in found]
        tokens = [one.more["tokens"] for one in found]
        peaks = [float(one.peak_bytes or 1) for one in found]
        times = [one.median for one in found]
        over = values if axis == "layers" else tokens
        cells.append((
            axis, ", ".join(f"{v:.0f}" for v in values), ", ".join(str(t) for t in tokens),
            ", ".join(f"{t:.2f}" for t in times), f"{exponent(over, times):.2f}",
            ", ".join(f"{p / 1e6:.0f}" for p in peaks), f"{exponent(over, peaks):.2f}",
        ))  # fmt: skip
    heads = ("what grows", "values", "packed tokens", "seconds", "exponent (of tokens; of layers)", "peak MB",
             "exponent")  # fmt: skip
    shown = {"scale": table(heads, cells)}
    if of_part(rows, "grid"):
        token, pair, explained = token_and_pair(rows)
        shown["scale"] += (
            f"\n\nOver prompts of {_values(rows, 'prompt')} and batches of {_values(rows, 'batch')}: "
            f"{token * 1e3:.2f} ms for each packed token, {pair * 1e3:.3f} ms for each pair of a query and a prompt "
            f"token, {pair / token:.1%} of a token (by attention to the prompt; 100 % with copies of it); that "
            f"explains {explained:.2%} of the variance."
        )
    widths = of_part(rows, "width")
    columns = ("shape", "width", "layers", "parameters", "seconds", "ms per packed token and 10⁹ parameters", "peak MB")
    shown["scale-width"] = table(columns, [
        (one.case["model"], one.more["width"], one.case["layers"], f"{one.more['parameters'] / 1e6:.0f} M",
         f"{one.median:.2f}", f"{one.median / one.more['tokens'] / one.more['parameters'] * 1e12:.1f}",
         f"{(one.peak_bytes or 0) / 1e6:.0f}")
        for one in widths
    ])  # fmt: skip
    fits = _largest(of_part(rows, "fit"))
    if fits:
        shown["scale-batch"] = table(
            ("prompt 64, query 64", *(f"largest batch in {gb} GB" for gb in BUDGETS), "MB for each example"),
            [(name, *batches, f"{each / 1e6:.0f}") for name, batches, each in fits],
        )
    return shown


def _largest(rows: Sequence[Row]) -> list[tuple[str, list[int], float]]:
    found = []
    for name in dict.fromkeys(one.contender for one in rows):
        first, second = (one for one in rows if one.contender == name)
        step = float(second.peak_bytes or 0) - float(first.peak_bytes or 0)
        each = step / (float(second.case["batch"]) - float(first.case["batch"]))
        fixed = float(first.peak_bytes or 0) - each * float(first.case["batch"])
        found.append((TITLES[name], [max(0, int((gb * 1e9 - fixed) / each)) for gb in BUDGETS], each))
    return found


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """Time and memory along each axis, by packed tokens."""
    import matplotlib.pyplot as plt

    from bench.harness import pictures as draw

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.6))
    colours = (draw.OURS, draw.OTHER, draw.OURS_THREE, draw.OTHER_THREE)
    for (axis, found), colour in zip(_axes(rows).items(), colours, strict=False):
        if axis == "layers":
            continue
        tokens = [one.more["tokens"] for one in found]
        left.plot(tokens, [one.median for one in found], "o-", color=colour, label=f"{axis} grows")
        right.plot(tokens, [(one.peak_bytes or 0) / 1e6 for one in found], "o-", color=colour)
    for axes, label in ((left, "seconds per step"), (right, "peak MB above the loaded model")):
        axes.set_xlabel("packed tokens")
        axes.set_ylabel(label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    left.legend(fontsize=8)
    return {"scale": figure}
