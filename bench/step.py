"""How fast, and in how much memory, is one optimisation step against PEFT prompt tuning and plain transformers?

Forward and backward of one step on SmolLM2-135M-Instruct with the same ids and targets for all: PEFT prompt tuning,
autograd on `inputs_embeds` of a transformers model, the same under `torch.compile` (compiled before anything counts),
and embedgrad with two memory policies and, at the first shape, two kinds of weights. Every contender is a process of
its own; the steps of all take turns, so that a noisy machine is noisy for all. The first step of each is not timed.
Memory is the peak of the resident size during any step, the first one too, above its size once the model is loaded and
has been used once, and beside it that of the whole process. The floor (`bench/floor.py`) is what BLAS needs for the
step's necessary operations, measured in the same turns.

The grid goes to where little is shared, and to batches of one, with fewer contenders.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from bench import resident
from bench.breakdown import breakdown
from bench.contenders import OTHERS, OURS, Case, Step, contender, load, our_step, our_version, task
from bench.markdown import seconds as shown
from bench.markdown import table
from bench.rows import Row, row
from bench.worker import Worker, serve

SHAPES = ("64/64/8", "200/50/8", "32/250/8")
CONTENDERS = ("floor", *OTHERS, *OURS, "breakdown")
FEWEST = 2  # steps that count
UNSHOWN = ("floor", "breakdown")  # in the tables of contenders
# At how many of the shapes, where not at all: compiling takes more than a minute for each, stored weights take the time
# of `layer`, and plain autograd at the largest shape says what PEFT says.
AT_FIRST = {"transformers-compiled": 1, "embedgrad-stored": 1, "transformers": 2}
GRID = ("16/512/1", "128/128/1", "16/16/8", "128/16/8")
GRID_CONTENDERS = ("floor", "peft", "embedgrad")
CHECKS = (
    "tests/engine/test_gradient.py::test_smollm2_equals_transformers",
    "tests/engine/test_native_backend.py::test_the_engine_agrees_with_the_reference",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--shapes", nargs="*", default=None, help=f"prompt/query/batch (default: {' '.join(SHAPES)})")
    parser.add_argument("--grid", nargs="*", default=None, help=f"with fewer contenders (default: {' '.join(GRID)})")
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=None, help="default: all")
    parser.add_argument("--repeats", type=int, default=5, help="steps per contender that count (default 5)")
    parser.add_argument("--seconds", type=float, default=120, help="start no third round after so long (default 120)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--backend", default="auto", help="of embedgrad (default auto)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> list[Row]:
    """Measure; the rows."""
    from bench.clock import device

    device(args.device)
    if args.worker:
        _work(args.worker, args.backend, args.device)
        return []
    shapes = args.shapes if args.shapes is not None else SHAPES[:1] if args.quick else SHAPES
    grid = args.grid if args.grid is not None else () if args.quick or args.shapes is not None else GRID
    repeats = 2 if args.quick else args.repeats
    chosen = args.contenders or [n for n in CONTENDERS if not (args.quick and n == "transformers-compiled")]
    rows: list[Row] = []
    for number, shape in enumerate(shapes):  # processes of their own: nothing of another shape's memory is left
        names = [name for name in chosen if args.contenders or number < AT_FIRST.get(name, len(shapes))]
        rows += _compare("step", [shape], names, repeats, args)
    ascending = sorted(grid, key=lambda text: Case.parse(text).tokens)
    rows += _compare("grid", ascending, [n for n in GRID_CONTENDERS if n in chosen], min(repeats, 2), args)
    return rows


def _compare(
    part: str, shapes: Sequence[str], contenders: Iterable[str], repeats: int, args: argparse.Namespace
) -> list[Row]:
    if not shapes:
        return []
    rows: list[Row] = []
    options = ("--backend", args.backend, "--device", args.device)
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker("step", "--worker", name, *options, threads=args.threads))
            for name in contenders
        }
        for shape in shapes:
            answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
            started = time.monotonic()
            for number in range(repeats + 1):
                if number > FEWEST and time.monotonic() - started > args.seconds:
                    break
                for name, worker in workers.items():
                    first = number == 0
                    if name != "breakdown" or number == FEWEST:
                        answers[name].append(worker.ask(case=shape, first=first))
            versions = {name: worker.ready["version"] for name, worker in workers.items()}
            found = _rows(part, Case.parse(shape), args, answers, versions)
            print(f"{part} {shape}: " + ", ".join(f"{r.contender} {shown(r.median)}" for r in found), flush=True)
            rows += found
    return rows


def _rows(
    part: str, case: Case, args: argparse.Namespace, answers: dict[str, list[dict[str, Any]]], versions: dict[str, str]
) -> list[Row]:
    found = []
    losses = {name: steps[-1]["loss"] for name, steps in answers.items() if "loss" in steps[-1]}
    expected = losses.get("peft", next(iter(losses.values())))
    for name, loss in losses.items():
        if abs(loss - expected) > 1e-4 * abs(expected) and args.device == "cpu":
            raise SystemExit(f"{name} computes the loss {loss} at {case}, others {expected}: no figure counts.")
    for name, all_steps in answers.items():
        steps = all_steps if name == "breakdown" else all_steps[1:]
        last = steps[-1]
        more: dict[str, Any] = {key: last[key] for key in ("loss", "gradient_norm", "breakdown") if key in last}
        held = steps if name == "transformers-compiled" else all_steps  # compiling itself does not count
        more |= {key: max(s[key] for s in held) for key in ("process_bytes", "torch_bytes") if key in last}
        found.append(row(
            "step", name, versions[name], [s["seconds"] for s in steps],
            case={"part": part, **vars(case), "threads": args.threads, "device": args.device},
            peak_bytes=max((s["peak_bytes"] for s in held if "peak_bytes" in s), default=None), **more,
        ))  # fmt: skip
    return found


# ---- the contenders' side --------------------------------------------------------------------------------------------


def _work(name: str, backend: str, device: str) -> None:
    import torch

    torch_bytes = resident.resident()
    where = torch.device(device)
    if name == "floor":
        return _serve_floor(where)
    if name == "breakdown":
        return _serve_breakdown(backend, where)
    build, version = contender(name, backend, where)
    base = resident.used(where)
    steps: dict[Case, Step] = {}

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        case = Case.parse(request["case"])
        if request["first"]:
            steps.clear()
            resident.used(where)  # gives back what the last case has freed
            steps[case] = build(case)
        return _measured(steps[case], where, base, torch_bytes)

    serve({"version": version}, measure)


def _measured(step: Step, where: Any, base: int, torch_bytes: int) -> dict[str, Any]:
    resident.forget_peak(where)
    started = time.perf_counter()
    loss, norm = step()  # both numbers wait for the device
    seconds = time.perf_counter() - started
    peak = resident.peak(where)
    return {"seconds": seconds, "loss": loss, "gradient_norm": norm, "peak_bytes": peak - base,
            "process_bytes": peak, "torch_bytes": torch_bytes}  # fmt: skip


def _serve_floor(where: Any) -> None:
    import torch

    import embedgrad
    from bench.floor import seconds
    from embedgrad.rendering import render
    from embedgrad.tasks import smollm2
    from embedgrad.tree import build_tree

    model = embedgrad.load_model(smollm2.path(), weights="stored")

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        soft, examples = task(model, Case.parse(request["case"]))
        tree = build_tree([render(model, soft, example) for example in examples])
        return {"seconds": seconds(model.config, tree, where, repeats=2)}

    serve({"version": f"torch {torch.__version__}"}, measure)


def _serve_breakdown(backend: str, where: Any) -> None:
    model = load(where, backend=backend, weights="compute")

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        parts = breakdown(model, our_step(model, Case.parse(request["case"]), "all"))
        return {"seconds": sum(parts.values()), "breakdown": parts}

    serve({"version": our_version(model)}, measure)


# ---- what is shown ---------------------------------------------------------------------------------------------------

NAMES = {
    "peft": "PEFT prompt tuning", "transformers": "transformers, autograd",
    "transformers-compiled": "the same, `torch.compile`", "embedgrad": "embedgrad, policy `all`",
    "embedgrad-layer": "embedgrad, policy `layer`", "embedgrad-stored": "embedgrad, `layer`, Q4_1 as stored",
}  # fmt: skip


def _case(one: Row) -> Case:
    return Case(*(int(one.case[key]) for key in ("prompt", "query", "batch")))


def _by_case(rows: Iterable[Row], part: str) -> dict[Case, dict[str, Row]]:
    found: dict[Case, dict[str, Row]] = defaultdict(dict)
    for one in rows:
        if one.case["part"] == part:
            found[_case(one)][one.contender] = one
    return found


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`step`: the shapes with all contenders; `step-grid`: speed-ups over the grid."""
    found = {}
    heads = ("prompt/query/batch", "", "seconds", "20..80 %", "against PEFT", "of the floor", "peak MB", "of PEFT's",
             "whole process, MB")  # fmt: skip
    cells: list[Sequence[object]] = []
    for case, named in _by_case(rows, "step").items():
        floor, peft = named.get("floor"), named.get("peft")
        for number, (name, one) in enumerate((n, r) for n, r in named.items() if n not in UNSHOWN):
            assert one.peak_bytes is not None
            cells.append((
                None if number else case, NAMES[name], f"{one.median:.2f}", f"{one.low:.2f}..{one.high:.2f}",
                f"{peft.median / one.median:.2f}×" if peft and name != "peft" else None,
                f"{floor.median / one.median:.0%}" if floor else None, f"{one.peak_bytes / 1e6:.0f}",
                f"{one.peak_bytes / peft.peak_bytes:.3f}" if peft and peft.peak_bytes and name != "peft" else None,
                f"{one.more['process_bytes'] / 1e6:.0f}",
            ))  # fmt: skip
    if cells:
        torch_bytes = [r.more["torch_bytes"] for r in rows if "torch_bytes" in r.more]
        repeats = max(r.repeats for r in rows if r.case["part"] == "step")
        found["step"] = table(heads, cells) + (
            f"\n\nMedians of {repeats}, {rows[0].case['threads']} threads. A process that has only imported torch "
            f"holds {sorted(torch_bytes)[len(torch_bytes) // 2] / 1e6:.0f} MB."
        )
    grid = _by_case(rows, "grid")
    if grid:
        columns = ("prompt/query/batch", "PEFT, s", "embedgrad, s", "against PEFT", "ideal",
                   "of the floor", "memory of PEFT's")  # fmt: skip
        found["step-grid"] = table(columns, (_grid_cells(*item) for item in sorted(grid.items(), key=_order)))
    return found


def _order(item: tuple[Case, Any]) -> tuple[int, ...]:
    case = item[0]
    return case.batch, case.prompt, case.query


def _grid_cells(case: Case, named: dict[str, Row]) -> Sequence[object]:
    peft, ours = named["peft"], named["embedgrad"]
    assert peft.peak_bytes is not None
    assert ours.peak_bytes is not None
    return (
        case, f"{peft.median:.2f}", f"{ours.median:.2f}",
        f"{peft.median / ours.median:.2f}×", f"{case.ideal:.2f}×", f"{named['floor'].median / ours.median:.0%}",
        f"{ours.peak_bytes / peft.peak_bytes:.2f}",
    )  # fmt: skip


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """Time and memory of the shapes; the grid's speed-up against the ideal, and its fraction of the floor."""
    from bench.step_pictures import against_ideal, breakdowns, of_floor, shapes

    found = {}
    main, grid = _by_case(rows, "step"), _by_case(rows, "grid")
    if main:
        found["step-time"] = shapes(main, NAMES, "seconds", lambda one: one.median)
        found["step-breakdown"] = breakdowns({case: n["breakdown"] for case, n in main.items() if "breakdown" in n})
        label = "peak MB above the loaded model"
        found["step-memory"] = shapes(main, NAMES, label, lambda one: (one.peak_bytes or 0) / 1e6)
    if grid:
        found["step-ideal"] = against_ideal(grid)
        found["step-floor"] = of_floor(grid)
    return found
