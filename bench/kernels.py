"""What do the kernels compile to (`--static`), and what does their machine code execute (`--executed`)?

`--static` takes the specimens that the documents show: Qwen2.5-Math-1.5B's shapes in bfloat16 for all four targets, and
7B's for one; `--every` takes all types, sizes and rows of the launch table. The CUDA twins of csrc/cuda are compiled
beside them where nvcc is installed.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.markdown import human, table
from bench.rows import Row

CHECKS = ("tests/kernels/test_harness.py", "tests/kernels/test_launch.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--static", action="store_true", help="compile for sm_80, sm_90, sm_100 and gfx942, and read it")
    which.add_argument("--executed", action="store_true", help="run the gfx942 code in an emulator, and count")
    parser.add_argument("--every", action="store_true", help="all specimens, not just those of the documents")
    parser.add_argument("--only", metavar="TEXT", default="", help="only specimens or trials whose name contains TEXT")
    parser.add_argument("--arch", action="append", metavar="ARCH", help="only this target (repeat for several)")
    parser.add_argument("--dtype", action="append", metavar="TYPE", help="only bfloat16, float16 or float32 (repeat)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")


def main(args: argparse.Namespace) -> list[Row]:
    if args.static:
        from bench import cuda_twins, kernels_static

        return kernels_static.report(args) + cuda_twins.rows(("sm_90",) if args.quick else cuda_twins.ARCHES)
    from bench import kernels_executed

    return kernels_executed.report(args)


def _part(rows: Sequence[Row], part: str) -> list[Row]:
    return [one for one in rows if one.case["part"] == part]


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`kernels-costs`, `kernels-compiled` and `kernels-cuda`, for what has been compiled."""
    found: dict[str, str] = {}
    if static := _part(rows, "static"):
        found |= {"kernels-costs": _costs(static), "kernels-compiled": _compiled(static)}
    if cuda := _part(rows, "cuda"):
        found["kernels-cuda"] = table(
            ("kernel", "target", "registers", "spills, bytes", "shared, bytes", "stack, bytes"),
            [(r.contender, r.case["arch"], f"{r.median:.0f}", r.more["spills"], r.more["shared"], r.more["stack"])
             for r in cuda],
        )  # fmt: skip
    return found


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
    """Kernel by kernel, in the order in which they were compiled, and the targets within."""
    names = list(dict.fromkeys((r.case["op"], r.contender) for r in rows))
    arches = list(dict.fromkeys(r.case["arch"] for r in rows))
    return names.index((one.case["op"], one.contender)), arches.index(one.case["arch"])


def _costs(rows: Sequence[Row]) -> str:
    """By count, of the first target compiled; roofline times of all machines for the larger model."""
    small, large = "Qwen2.5-Math-1.5B", "Qwen2.5-Math-7B"
    first: dict[str, dict[str, Row]] = {}
    for one in rows:
        first.setdefault(str(one.case["op"]), {}).setdefault(str(one.case["model"]), one)
    machines = list(rows[0].more["roofline_us"])
    cells: list[list[object]] = []
    for op, models in first.items():
        line: list[object] = [op]
        for model in (small, large):
            r = models.get(model)
            line += (
                [human(r.more["least_bytes"], "B"), f"{r.more['moved_bytes'] / r.more['least_bytes']:.2f}"]
                if r
                else [None, None]
            )
        some = models.get(large) or models[small]
        line.append(f"{some.more['intensity']:.1f}")
        line += [f"{some.more['roofline_us'][name]:.1f}" for name in machines]
        cells.append(line)
    heads = ("kernel", "1.5B: least", "moved / least", "7B: least", "moved / least", "operations per byte",
             *(f"{name}, µs" for name in machines))  # fmt: skip
    return table(heads, cells)


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """The roofline: operations per byte against what the machines allow, of the larger model."""
    import matplotlib.pyplot as plt

    from bench import style
    from bench.machines import MACHINES

    static = _part(rows, "static")
    if not static:
        return {}
    figure, axes = plt.subplots(figsize=(7.4, 4.4))
    reach = [2.0**n for n in range(-3, 14)]
    for machine, colour in zip(MACHINES, (style.OTHER, style.OURS, style.OURS_THREE, style.OTHER_THREE), strict=True):
        peak = machine.matrix["bf16"]
        axes.plot(reach, [min(x * machine.bandwidth, peak) / 1e12 for x in reach], color=colour, label=machine.name)
    shown: dict[str, float] = {}
    for one in static:
        if one.more["intensity"] > 0.1 and one.case["dtype"] == "bfloat16" and "+" not in str(one.case["op"]):
            shown.setdefault(str(one.case["op"]), one.more["intensity"])
    for number, (op, x) in enumerate(sorted(shown.items(), key=lambda item: item[1])):
        axes.axvline(x, color=style.LIMIT, linewidth=0.6, alpha=0.5)
        axes.annotate(op, (x, 0.12 * 1.6 ** (number % 8)), fontsize=6, rotation=0, ha="left")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.1, 4000)
    axes.set_xlabel("operations per byte that must be moved")
    axes.set_ylabel("T operations/s at the data-sheet rates, bf16")
    axes.legend(fontsize=8, loc="upper left")
    return {"kernels-roofline": figure}
