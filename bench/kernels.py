"""What do the kernels compile to (`--static`), and what does their machine code execute (`--executed`)?

`--static` compiles the specimens that the documents show: Qwen2.5-Math-1.5B's shapes in bfloat16 for all four targets,
and 7B's for one. `--every` takes all types, sizes and rows of the launch table. The CUDA sources of csrc/cuda are
compiled too where nvcc is installed.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.harness.accelerators import ACCELERATORS
from bench.harness.markdown import human, table
from bench.harness.models import QWEN_1_5B, QWEN_7B
from bench.harness.rows import Row, of_part

CHECKS = ("tests/kernels/test_harness.py", "tests/kernels/test_launch.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--static", action="store_true", help="compile for sm_80, sm_90, sm_100 and gfx942, and read it")
    which.add_argument("--executed", action="store_true", help="run the gfx942 code in an emulator, and count")
    parser.add_argument("--every", action="store_true", help="all specimens, not just those of the documents")
    parser.add_argument("--only", metavar="TEXT", default="", help="only specimens or trials whose name contains TEXT")
    parser.add_argument("--arch", action="append", metavar="ARCH", help="only this target (repeat for several)")
    parser.add_argument("--dtype", action="append", metavar="TYPE", help="only bfloat16, float16 or float32 (repeat)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")


def main(args: argparse.Namespace) -> list[Row]:
    """Compile or execute; the rows."""
    if args.static:
        from bench.machine_code import cuda_sources, static

        return static.report(args) + cuda_sources.rows(("sm_90",) if args.quick else cuda_sources.ARCHES)
    from bench.machine_code import executed

    return executed.report(args)


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`kernels-costs`, `kernels-compiled`, `kernels-cuda` and `kernels-executed`, as far as there are rows."""
    made = (("kernels-costs", "static", _costs), ("kernels-compiled", "static", _compiled),
            ("kernels-cuda", "cuda", _cuda), ("kernels-executed", "executed", _executed))  # fmt: skip
    return {name: make(found) for name, part, make in made if (found := of_part(rows, part))}


def _cuda(rows: Sequence[Row]) -> str:
    heads = ("kernel", "target", "registers", "spills, bytes", "shared, bytes", "stack, bytes")
    return table(heads, [
        (r.contender, r.case["arch"], f"{r.median:.0f}", r.more["spills"], r.more["shared"], r.more["stack"])
        for r in rows
    ])  # fmt: skip


def _executed(rows: Sequence[Row]) -> str:
    kinds = ("matrix", "vector", "scalar", "global", "shared")
    heads = ("trial", "type", "error", "allowed", *kinds, "matrix operations done / useful", "vector / matrix")
    cells = []
    for r in rows:
        ratios = ("–" if r.more[k] is None else f"{r.more[k]:.2f}" for k in ("done_per_useful", "vector_per_matrix"))
        errors = f"{r.median:.1e}", f"{r.more['allowed']:.1e}"
        cells.append((r.contender, r.case["dtype"], *errors, *(r.more[kind] for kind in kinds), *ratios))
    return table(heads, cells)


def _compiled(rows: Sequence[Row]) -> str:
    heads = ("kernel", "target", "registers", "spills", "shared, bytes", "occupancy", "128-bit loads",
             "matrix instructions")  # fmt: skip
    shown = [one for one in rows if one.case["model"] == rows[0].case["model"]]
    cells = []
    for r in sorted(shown, key=lambda r: _order(shown, r)):
        matrix = ", ".join(f"{n} {name}" for name, n in Counter(r.more["matrix"]).most_common())
        cells.append((
            f"{r.case['op']}: {r.contender.removesuffix('_kernel')}", r.case["arch"], f"{r.median:.0f}",
            r.more["spills"], r.more["shared"], f"{r.more['occupancy']:.0%}", f"{r.more['vector_loads']:.0%}",
            matrix or "–",
        ))  # fmt: skip
    return table(heads, cells)


def _order(rows: Sequence[Row], one: Row) -> tuple[int, ...]:
    """By kernel, in the order of compilation, then by target."""
    names = list(dict.fromkeys((r.case["op"], r.contender) for r in rows))
    arches = list(dict.fromkeys(r.case["arch"] for r in rows))
    return names.index((one.case["op"], one.contender)), arches.index(one.case["arch"])


def _costs(rows: Sequence[Row]) -> str:
    """Counts of the first target compiled; roofline times on all machines for the larger model."""
    first: dict[str, dict[str, Row]] = {}
    for one in rows:
        first.setdefault(str(one.case["op"]), {}).setdefault(str(one.case["model"]), one)
    machines = list(rows[0].more["roofline_us"])
    cells: list[list[object]] = []
    for op, models in first.items():
        line: list[object] = [op]
        for model in (QWEN_1_5B, QWEN_7B):
            line += _bytes(models[model].more) if model in models else (None, None)
        some = models.get(QWEN_7B) or next(iter(models.values()))
        line.append(f"{some.more['intensity']:.1f}")
        line += [f"{some.more['roofline_us'][name]:.1f}" for name in machines]
        cells.append(line)
    heads = ("kernel", "1.5B: least", "moved / least", "7B: least", "moved / least", "operations per byte",
             *(f"{name}, µs" for name in machines))  # fmt: skip
    return table(heads, cells)


def _bytes(more: dict[str, Any]) -> tuple[str, str]:
    return human(more["least_bytes"], "B"), f"{more['moved_bytes'] / more['least_bytes']:.2f}"


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """The roofline: operations per byte of each kernel, and the rates that the machines reach with so many."""
    import matplotlib.pyplot as plt

    from bench.harness import pictures as draw

    static = of_part(rows, "static")
    if not static:
        return {}
    figure, axes = plt.subplots(figsize=(7.4, 4.4))
    reach = [2.0**n for n in range(-3, 14)]
    colours = (draw.OTHER, draw.OURS, draw.OURS_THREE, draw.OTHER_THREE)
    for machine, colour in zip(ACCELERATORS, colours, strict=True):
        peak = machine.matrix["bf16"]
        axes.plot(reach, [min(x * machine.bandwidth, peak) / 1e12 for x in reach], color=colour, label=machine.name)
    shown: dict[str, float] = {}
    for one in static:
        if one.more["intensity"] > 0.1 and one.case["dtype"] == "bfloat16" and "+" not in str(one.case["op"]):
            shown.setdefault(str(one.case["op"]), one.more["intensity"])
    for number, (op, x) in enumerate(sorted(shown.items(), key=lambda item: item[1])):
        axes.axvline(x, color=draw.LIMIT, linewidth=0.6, alpha=0.5)
        axes.annotate(op, (x, 0.12 * 1.6 ** (number % 8)), fontsize=6, rotation=0, ha="left")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.1, 4000)
    axes.set_xlabel("operations per byte that must be moved")
    axes.set_ylabel("T operations/s at the data-sheet rates, bf16")
    axes.legend(fontsize=8, loc="upper left")
    return {"kernels-roofline": figure}
