"""How fast, and in how much memory, is one optimisation step against PEFT prompt tuning and plain transformers?

All contenders compute one step, forward and backward, of the same model (`--model`; by default SmolLM2-135M-Instruct)
with the same ids and targets: PEFT prompt tuning; autograd on `inputs_embeds` of a transformers model; the same under
`torch.compile`, compiled before anything counts; and embedgrad with two memory policies and, at the first shape, two
kinds of weights. Every contender is a process of its own and they take turns, so that a noisy machine is noisy for
all. The first step of each is not timed. Memory is the peak of the resident size during any step, the first one too,
above its size after the model was loaded and used once. The peak of the whole process stands beside it. The floor
(`bench/harness/floor.py`) is the time that BLAS needs for the step's necessary operations, measured in the same
turns.

The grid has cases in which examples share little, and batches of one, with fewer contenders.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import files, resident
from bench.harness.arguments import add_machine, positive
from bench.harness.breakdown import breakdown
from bench.harness.clock import device
from bench.harness.contenders import OTHERS, OURS, TITLES, Case, Step, contender, load, our_step, our_version, tree_of
from bench.harness.files import ModelFile
from bench.harness.markdown import seconds as shown
from bench.harness.markdown import table
from bench.harness.rows import Row, row
from bench.harness.worker import serve, workers

SHAPES = ("64/64/8", "200/50/8", "32/250/8")
CONTENDERS = ("floor", *OTHERS, *OURS, "breakdown")
FEWEST = 2  # steps that count
UNSHOWN = ("floor", "breakdown")  # in the tables of contenders
# How many of the shapes a contender takes part in, where not in all. Compiling takes more than a minute a shape; stored
# weights take the time of `layer`; plain autograd at the largest shape says what PEFT says.
AT_FIRST = {"transformers-compiled": 1, "embedgrad-stored": 1, "embedgrad-all-stored": 1, "transformers": 2}
GRID = ("16/512/1", "128/128/1", "16/16/8", "128/16/8")
GRID_CONTENDERS = ("floor", "peft", "embedgrad")
CHECKS = (
    "tests/engine/test_gradient.py::test_smollm2_equals_transformers",
    "tests/backends/test_native.py::test_the_engine_agrees_with_the_reference",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    files.add_argument(parser)
    parser.add_argument(
        "--shapes", nargs="*", type=Case.told, default=None, help=f"prompt/query/batch (default: {' '.join(SHAPES)})"
    )
    parser.add_argument(
        "--grid", nargs="*", type=Case.told, default=None, help=f"with fewer contenders (default: {' '.join(GRID)})"
    )
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=None, help="default: all")
    parser.add_argument("--repeats", type=positive, default=5, help="steps per contender that count (default 5)")
    parser.add_argument("--seconds", type=float, default=120, help="start no third round after so long (default 120)")
    add_machine(parser, backend=True)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> list[Row]:
    """Measure; the rows."""
    where = device(args.device)
    if args.worker:
        _work(args.worker, args.path, args.backend, where)
        return []
    with files.model_files(args.model) as found:
        return [one for file in found for one in _of_file(file, args)]


def _of_file(file: ModelFile, args: argparse.Namespace) -> list[Row]:
    print(f"{file.title} ({file.types})", flush=True)
    shapes = args.shapes if args.shapes is not None else SHAPES[:1] if args.quick else SHAPES
    grid = args.grid if args.grid is not None else () if args.quick or args.shapes is not None else GRID
    repeats = 2 if args.quick else args.repeats
    chosen = args.contenders or [n for n in CONTENDERS if not (args.quick and n == "transformers-compiled")]
    rows: list[Row] = []
    for number, shape in enumerate(shapes):  # each shape has new processes, without memory of another shape
        names = [name for name in chosen if args.contenders or number < AT_FIRST.get(name, len(shapes))]
        rows += _compare("step", file, [shape], names, repeats, args)
    ascending = sorted(grid, key=lambda text: Case.parse(text).tokens)
    rows += _compare("grid", file, ascending, [n for n in GRID_CONTENDERS if n in chosen], min(repeats, 2), args)
    return rows


def _compare(
    part: str,
    file: ModelFile,
    shapes: Sequence[str],
    contenders: Iterable[str],
    repeats: int,
    args: argparse.Namespace,
) -> list[Row]:
    if not shapes:
        return []
    rows: list[Row] = []
    options = ("--backend", args.backend, "--device", args.device, "--path", str(file.path))
    with workers("step", {name: ("--worker", name, *options) for name in contenders}, args.threads) as running:
        versions = {name: worker.ready["version"] for name, worker in running.items()}
        for shape in shapes:
            answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
            started = time.monotonic()
            for number in range(repeats + 1):
                if number > FEWEST and time.monotonic() - started > args.seconds:
                    break
                for name, worker in running.items():
                    if name != "breakdown" or number == FEWEST:
                        answers[name].append(worker.ask(case=shape, first=number == 0))
            found = _rows(part, file, Case.parse(shape), args, answers, versions)
            print(f"{part} {shape}: " + ", ".join(f"{r.contender} {shown(r.median)}" for r in found), flush=True)
            rows += found
    return rows


def _rows(
    part: str,
    file: ModelFile,
    case: Case,
    args: argparse.Namespace,
    answers: dict[str, list[dict[str, Any]]],
    versions: dict[str, str],
) -> list[Row]:
    found = []
    losses = {name: steps[-1]["loss"] for name, steps in answers.items() if "loss" in steps[-1]}
    expected = losses.get("peft", next(iter(losses.values()), 0.0))
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
            case={"model": file.title, "types": file.types, "part": part, **vars(case), "threads": args.threads,
                  "device": args.device},
            peak_bytes=max((s["peak_bytes"] for s in held if "peak_bytes" in s), default=None), **more,
        ))  # fmt: skip
    return found


# ---- the contenders' side --------------------------------------------------------------------------------------------


def _work(name: str, path: Path, backend: str, where: torch.device) -> None:
    torch_bytes = resident.resident()  # before anything else is imported
    if name == "floor":
        return _serve_floor(path, where)
    if name == "breakdown":
        return _serve_breakdown(path, backend, where)
    build, version = contender(name, path, backend, where)
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


def _measured(step: Step, where: torch.device, base: int, torch_bytes: int) -> dict[str, Any]:
    resident.forget_peak(where)
    started = time.perf_counter()
    loss, norm = step()  # numbers on the host: the device has finished
    seconds = time.perf_counter() - started
    peak = resident.peak(where)
    return {"seconds": seconds, "loss": loss, "gradient_norm": norm, "peak_bytes": peak - base,
            "process_bytes": peak, "torch_bytes": torch_bytes}  # fmt: skip


def _serve_floor(path: Path, where: torch.device) -> None:
    import embedgrad
    from bench.harness.floor import seconds

    model = embedgrad.load_model(path, weights="stored")

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        tree = tree_of(model, Case.parse(request["case"]))
        return {"seconds": seconds(model.config, tree, where, repeats=2)}

    serve({"version": f"torch {torch.__version__}"}, measure)


def _serve_breakdown(path: Path, backend: str, where: torch.device) -> None:
    model = load(path, where, backend=backend, weights="compute")

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        parts = breakdown(model, our_step(model, Case.parse(request["case"]), "all"))
        return {"seconds": sum(parts.values()), "breakdown": parts}

    serve({"version": our_version(model)}, measure)


# ---- what is shown ---------------------------------------------------------------------------------------------------

ByCase = Mapping[Case, Mapping[str, Row]]


def _by_case(rows: Iterable[Row], part: str) -> ByCase:
    found: dict[Case, dict[str, Row]] = defaultdict(dict)
    for one in rows:
        if one.case["part"] == part:
            found[Case.of(one)][one.contender] = one
    return found


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`step`: the shapes with all contenders; `step-grid`: speed-ups over the grid. Both for every model."""
    found: dict[str, list[str]] = defaultdict(list)
    columns = ("prompt/query/batch", "PEFT, s", "embedgrad, s", "against PEFT", "ideal",
               "of the floor", "memory of PEFT's")  # fmt: skip
    for title, of_model in files.by_model(rows).items():
        shapes, grid = _by_case(of_model, "step"), _by_case(of_model, "grid")
        if shapes:
            found["step"] += [f"**{title}**", _shapes_table(shapes)]
        if grid:
            cells = (_grid_cells(case, grid[case]) for case in sorted(grid, key=_order))
            found["step-grid"] += [f"**{title}**", table(columns, cells)]
    if "step" in found:
        torch_bytes = [r.more["torch_bytes"] for r in rows if "torch_bytes" in r.more]
        repeats = max(r.repeats for r in rows if r.case["part"] == "step")
        found["step"].append(
            f"Medians of {repeats}, {rows[0].case['threads']} threads. A process that has only imported torch "
            f"holds {sorted(torch_bytes)[len(torch_bytes) // 2] / 1e6:.0f} MB."
        )
    return {name: "\n\n".join(parts) for name, parts in found.items()}


def _shapes_table(found: ByCase) -> str:
    heads = ("prompt/query/batch", "", "seconds", "20..80 %", "against PEFT", "of the floor", "peak MB", "of PEFT's",
             "whole process, MB")  # fmt: skip
    cells: list[Sequence[object]] = []
    for case, named in found.items():
        floor, peft = named.get("floor"), named.get("peft")
        for number, (name, one) in enumerate((n, r) for n, r in named.items() if n not in UNSHOWN):
            assert one.peak_bytes is not None
            cells.append((
                None if number else case, TITLES[name], f"{one.median:.2f}", f"{one.low:.2f}..{one.high:.2f}",
                f"{peft.median / one.median:.2f}×" if peft and name != "peft" else None,
                f"{floor.median / one.median:.0%}" if floor else None, f"{one.peak_bytes / 1e6:.0f}",
                f"{one.peak_bytes / peft.peak_bytes:.3f}" if peft and peft.peak_bytes and name != "peft" else None,
                f"{one.more['process_bytes'] / 1e6:.0f}",
            ))  # fmt: skip
    return table(heads, cells)


def _order(case: Case) -> tuple[int, ...]:
    return case.batch, case.prompt, case.query


def _grid_cells(case: Case, named: Mapping[str, Row]) -> Sequence[object]:
    peft, ours = named["peft"], named["embedgrad"]
    assert peft.peak_bytes is not None
    assert ours.peak_bytes is not None
    return (
        case, f"{peft.median:.2f}", f"{ours.median:.2f}",
        f"{peft.median / ours.median:.2f}×", f"{case.ideal:.2f}×", f"{named['floor'].median / ours.median:.0%}",
        f"{ours.peak_bytes / peft.peak_bytes:.2f}",
    )  # fmt: skip


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """Of the first model: time and memory at the shapes; the grid's speed-up against the ideal and the floor."""
    found = {}
    rows = next(iter(files.by_model(rows).values()))
    shapes, grid = _by_case(rows, "step"), _by_case(rows, "grid")
    if shapes:
        found["step-time"] = _bars(shapes, "seconds", "%.3g", lambda one: one.median)
        found["step-breakdown"] = _breakdowns({case: n["breakdown"] for case, n in shapes.items() if "breakdown" in n})
        label = "peak MB above the loaded model"
        found["step-memory"] = _bars(shapes, label, "%.0f", lambda one: (one.peak_bytes or 0) / 1e6)
    if grid:
        found["step-ideal"] = _against_ideal(grid)
        found["step-floor"] = _of_floor(grid)
    return found


def _bars(found: ByCase, label: str, numbers: str, value: Callable[[Row], float]) -> Any:
    """One group for each shape, one bar for each contender."""
    import matplotlib.pyplot as plt

    from bench.harness import pictures as draw

    figure, axes = plt.subplots(figsize=(8, 3.6))
    series = [
        (TITLES[name].replace("`", ""), draw.colour(name),
         [value(named[name]) if name in named else None for named in found.values()])
        for name in next(iter(found.values())) if name in TITLES
    ]  # fmt: skip
    draw.grouped_bars(axes, series, numbers=numbers)
    if label == "seconds":
        for i, named in enumerate(found.values()):
            if "floor" in named:
                axes.hlines(named["floor"].median, i - 0.42, i + 0.42, color=draw.LIMIT, linestyle="--",
                            label="matrix-product floor" if i == 0 else "")  # fmt: skip
    axes.set_xticks(range(len(found)), [str(case) for case in found])
    axes.set_xlabel("prompt / query / batch")
    axes.set_ylabel(label)
    axes.legend(fontsize=8)
    return figure


def _against_ideal(found: ByCase) -> Any:
    """The measured speed-up over the speed-up that sharing the prompt allows, and the diagonal."""
    import matplotlib.pyplot as plt

    from bench.harness import pictures as draw

    figure, axes = plt.subplots(figsize=(5.2, 4.6))
    for batch, marker, colour in ((1, "o", draw.OURS_TOO), (8, "s", draw.OURS)):
        cases = [case for case in found if case.batch == batch]
        speed = [found[case]["peft"].median / found[case]["embedgrad"].median for case in cases]
        label = f"against PEFT, batch {batch}"
        axes.scatter([case.ideal for case in cases], speed, marker=marker, color=colour, label=label)
    top = max(case.ideal for case in found) * 1.1
    axes.plot([1, top], [1, top], color=draw.LIMIT, linestyle="--", label="ideal: B(P+R) / (P+BR)")
    axes.axhline(1, color=draw.LIMIT, linewidth=0.8)
    axes.set_xlabel("ideal speed-up by sharing the prompt")
    axes.set_ylabel("measured speed-up of embedgrad")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def _of_floor(found: ByCase) -> Any:
    """The share of the matrix-product floor over the step's size."""
    import matplotlib.pyplot as plt

    from bench.harness import pictures as draw

    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    cases = sorted(found, key=lambda case: found[case]["floor"].median)
    floors = [found[case]["floor"].median for case in cases]
    for name in ("embedgrad", "peft"):
        share = [100 * floor / found[case][name].median for case, floor in zip(cases, floors, strict=True)]
        axes.plot(floors, share, "o", color=draw.colour(name), label=name)
    axes.set_xscale("log")
    axes.set_ylim(0, 105)
    axes.set_xlabel("matrix-product floor, seconds")
    axes.set_ylabel("% of the floor")
    axes.legend()
    return figure


def _breakdowns(found: Mapping[Case, Row]) -> Any:
    """Shares of our step: products of BLAS in blue, our own operations in the other colours."""
    import matplotlib.pyplot as plt

    from bench.harness import pictures as draw

    figure, axes = plt.subplots(figsize=(8, 2.9))
    names = list(dict.fromkeys(name for one in found.values() for name in one.more["breakdown"]))
    blues, others = plt.get_cmap("Blues"), plt.get_cmap("tab20")
    products = [name for name in names if name.endswith(("forward", "backward")) and " " in name]
    own = [name for name in names if name not in products]
    fills = {name: blues(0.9 - 0.7 * i / len(products)) for i, name in enumerate(products)}
    fills |= {name: others(i % 20) for i, name in enumerate(own)}
    shares = {name: [100 * one.more["breakdown"].get(name, 0) / one.median for one in found.values()] for name in fills}
    series = [(name, fills[name], share) for name, share in shares.items() if max(share) >= 0.4]
    draw.stacked_bars(axes, range(len(found)), series, edgecolor="white", linewidth=0.5)
    axes.set_yticks(range(len(found)), [str(case) for case in found])
    axes.set_xlabel("% of a step")
    axes.set_xlim(0, 100)
    axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
