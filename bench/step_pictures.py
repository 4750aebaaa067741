"""The pictures of `bench step`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt

from bench import style
from bench.contenders import Case
from bench.rows import Row

ByCase = Mapping[Case, Mapping[str, Row]]


def shapes(found: ByCase, names: Mapping[str, str], label: str, value: Callable[[Row], float]) -> Any:
    """Bars: one group per shape, one bar per contender."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    contenders = [n for n in next(iter(found.values())) if n in names]
    width = 0.8 / len(contenders)
    for place, name in enumerate(contenders):
        there = [(i, named[name]) for i, named in enumerate(found.values()) if name in named]
        at = [i + (place - (len(contenders) - 1) / 2) * width for i, _ in there]
        heights = [value(one) for _, one in there]
        bars = axes.bar(at, heights, width * 0.9, color=style.colour(name), label=names[name].replace("`", ""))
        axes.bar_label(bars, fmt="%.0f" if "MB" in label else "%.3g", fontsize=7, padding=1)
    if label == "seconds":
        for i, named in enumerate(found.values()):
            if "floor" in named:
                axes.hlines(named["floor"].median, i - 0.42, i + 0.42, color=style.LIMIT, linestyle="--",
                            label="matrix-product floor" if i == 0 else "")  # fmt: skip
    axes.set_xticks(range(len(found)), [str(case) for case in found])
    axes.set_xlabel("prompt / query / batch")
    axes.set_ylabel(label)
    axes.legend(fontsize=8)
    axes.grid(axis="x", visible=False)
    return figure


def against_ideal(found: ByCase) -> Any:
    """Measured speed-up over the one that sharing alone allows, and the diagonal."""
    figure, axes = plt.subplots(figsize=(5.2, 4.6))
    for batch, marker, colour in ((1, "o", style.OURS_TOO), (8, "s", style.OURS)):
        cases = [case for case in found if case.batch == batch]
        speed = [found[case]["peft"].median / found[case]["embedgrad"].median for case in cases]
        label = f"against PEFT, batch {batch}"
        axes.scatter([case.ideal for case in cases], speed, marker=marker, color=colour, label=label)
    top = max(case.ideal for case in found) * 1.1
    axes.plot([1, top], [1, top], color=style.LIMIT, linestyle="--", label="ideal: B(P+R) / (P+BR)")
    axes.axhline(1, color=style.LIMIT, linewidth=0.8)
    axes.set_xlabel("ideal speed-up by sharing the prompt")
    axes.set_ylabel("measured speed-up of embedgrad")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def of_floor(found: ByCase) -> Any:
    """Fraction of the matrix-product floor over the step's size."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for name in ("embedgrad", "peft"):
        cases = sorted(found, key=lambda case: found[case]["floor"].median)
        share = [100 * found[case]["floor"].median / found[case][name].median for case in cases]
        axes.plot([found[case]["floor"].median for case in cases], share, "o", color=style.colour(name), label=name)
    axes.set_xscale("log")
    axes.set_ylim(0, 105)
    axes.set_xlabel("matrix-product floor, seconds")
    axes.set_ylabel("% of the floor")
    axes.legend()
    return figure


def breakdowns(found: Mapping[Case, Row]) -> Any:
    """Shares of our step: BLAS in blue, our own operations in the other colours."""
    figure, axes = plt.subplots(figsize=(8, 2.9))
    names: list[str] = []
    for one in found.values():
        names += [name for name in one.more["breakdown"] if name not in names]
    blues, others = plt.get_cmap("Blues"), plt.get_cmap("tab20")
    products = [name for name in names if name.endswith(("forward", "backward")) and " " in name]
    own = [name for name in names if name not in products]
    left = [0.0] * len(found)
    for name in (*products, *own):
        widths = [100 * one.more["breakdown"].get(name, 0) / one.median for one in found.values()]
        if max(widths) < 0.4:
            continue
        is_product = name in products
        colour = blues(0.9 - 0.7 * products.index(name) / len(products)) if is_product else others(own.index(name) % 20)
        axes.barh(range(len(found)), widths, left=left, color=colour, edgecolor="white", linewidth=0.5, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(found)), [str(case) for case in found])
    axes.set_xlabel("% of a step")
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
