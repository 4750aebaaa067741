"""What the study of starting prompts came to: figures, words that follow from them, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from embedgrad.compare.outcome import Outcome
from embedgrad.compare.studies.pictures import BLUE, GREEN, GREY, ORANGE, SKY, VERMILION
from embedgrad.evaluation.evaluate import MEASURES
from embedgrad.evaluation.paired import Estimate, gain
from embedgrad.evaluation.statistics import McNemar, in_percent, in_points, wilson

GOOD = "good"
BEFORE, HELD, WIDE, FREE = "before", "cone 0.95", "cone 0.8", "no region"
SEARCHES = ("gcg", "pez")
COLOURS = {BEFORE: GREY, HELD: BLUE, WIDE: SKY, FREE: VERMILION, "gcg": GREEN, "pez": ORANGE}


def _mean(runs: Sequence[Outcome], measure: str) -> list[float]:
    """For each test item the share of the seeds that are right."""
    return list(np.mean([run.correct[measure] for run in runs], axis=0))


def _share(runs: Sequence[Outcome], measure: str) -> dict[str, float]:
    """The mean accuracy of the seeds with the Wilson interval of that share, and their standard deviation."""
    items = _mean(runs, measure)
    value = float(np.mean(items))
    each = [float(np.mean(run.correct[measure])) for run in runs]
    low, high = wilson(value, len(items))
    return {"value": value, "low": low, "high": high, "deviation": float(np.std(each, ddof=1)) if len(each) > 1 else 0}


def figures(
    runs: Sequence[Outcome], found: Mapping[str, Sequence[Outcome]], good: Sequence[Outcome], measure: str
) -> dict[str, Any]:
    """Accuracies, tokens, and the paired gains on the start as it is, on the narrow cone, and on the good start's.

    p: McNemar's against the narrow cone with the same seed, the largest of the seeds'.
    """
    held = found[HELD]
    pairs = zip(held, runs, strict=True) if len(runs) == len(held) else ()
    tests = [McNemar.of(a.correct[measure], b.correct[measure]) for a, b in pairs]
    similarities = [run.similarity for run in runs if run.similarity is not None]
    return {
        "accuracy": _share(runs, measure), "generated": _share(runs, "generated_accuracy"),
        "similarity": min(similarities) if similarities else None,
        "tokens": [run.forward_tokens + run.backward_tokens for run in runs], "steps": [run.steps for run in runs],
        "over_before": asdict(gain(_mean(found[BEFORE], measure), _mean(runs, measure))),
        "over_held": asdict(gain(_mean(held, measure), _mean(runs, measure))),
        "over_good": asdict(gain(_mean(good, measure), _mean(runs, measure))),
        "p": max((test.p for test in tests), default=None),
    }  # fmt: skip


def paragraph(data: dict[str, Any]) -> str:
    """Per start its figures; then what they mean for the question, each claim by an interval that leaves 0 out."""
    starts = data["starts"]
    told = [
        f"{name}: " + ", ".join(f"{way} {in_percent(one['accuracy'])}" for way, one in found.items())
        for name, found in starts.items()
    ]
    flawed = [name for name in starts if name != GOOD]
    gained = [n for n in flawed if Estimate(**starts[n][HELD]["over_before"]).low > 0]
    mended = [n for n in flawed if Estimate(**starts[n][HELD]["over_good"]).high >= 0]
    over, under = _sides(starts, FREE)
    ends = [
        _claim(gained, "In the cone of 0.95 these flawed starts gain on themselves", "no flawed start gains on itself"),
        _claim(mended, "These end as high as the good start, within the interval", "all end below the good start"),
    ]
    if any(FREE in found for found in starts.values()):
        ends.append(_claim(over, "Without a region these end higher than in that cone",
                           "no start ends higher without a region"))  # fmt: skip
    if under:
        ends.append(f"Without a region these end lower: {', '.join(under)}.")
    for way in SEARCHES:
        if any(way in found for found in starts.values()):
            over, under = _sides(starts, way)
            ends.append(
                f"At the same number of tokens {way} ends above the cone from {_named(over)}, below it from "
                f"{_named(under)}."
            )
    seeds = len(data["seeds"])
    head = f"By {MEASURES[data['measure']]}, on the test items, means of {seeds} seed{'s' if seeds > 1 else ''}. "
    return head + "; ".join(told) + ". " + " ".join(ends)


def table(data: Mapping[str, Any]) -> str:
    """One row for each start and way, in Markdown. Gains and p (of the gain on the narrow cone) are by the paragraph's
    measure."""
    measure = MEASURES[data["measure"]]
    lines = [
        f"| start | arm | {MEASURES['generated_accuracy']} | {measure} | gain on its own start | gain on {HELD} | p |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in data["starts"].items():
        for way, one in found.items():
            own = "–" if way == BEFORE else in_points(Estimate(**one["over_before"]))
            compared = way not in (BEFORE, HELD)
            over, p = (in_points(Estimate(**one["over_held"])), f"{one['p']:.2g}") if compared else ("–", "–")
            shares = (in_percent(one[key]) for key in ("generated", "accuracy"))
            lines.append(f"| {' | '.join((name, way, *shares, own, over, p))} |")
    note = (
        "Intervals: Wilson for accuracies, bootstrap over the items for gains. p: McNemar's, the largest of the seeds'."
    )
    return "\n".join([*lines, "", note])


def _sides(starts: Mapping[str, Any], way: str) -> tuple[list[str], list[str]]:
    """(the starts that end above the narrow cone by `way`, those that end below it), by the intervals."""
    known = {name: Estimate(**found[way]["over_held"]) for name, found in starts.items() if way in found}
    return [n for n, one in known.items() if one.low > 0], [n for n, one in known.items() if one.high < 0]


def _claim(names: Sequence[str], some: str, none: str) -> str:
    return f"{some}: {', '.join(names)}." if names else f"{none[0].upper()}{none[1:]}."


def _named(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def picture(data: dict[str, Any]) -> Any:
    import matplotlib.pyplot as plt

    starts = data["starts"]
    shown = {way: colour for way, colour in COLOURS.items() if any(way in found for found in starts.values())}
    figure, axes = plt.subplots(figsize=(8.5, 3.6))
    for place, (way, colour) in enumerate(shown.items()):
        shares = {i: found[way]["accuracy"] for i, found in enumerate(starts.values()) if way in found}
        at = [i + (place - (len(shown) - 1) / 2) * 0.13 for i in shares]
        errors = [[a["value"] - a["low"] for a in shares.values()], [a["high"] - a["value"] for a in shares.values()]]
        axes.errorbar(at, [a["value"] for a in shares.values()], yerr=errors, color=colour, marker="o", capsize=2,
                      markersize=4, linestyle="none", label=way)  # fmt: skip
    axes.set_xticks(range(len(starts)), list(starts))
    axes.set(ylabel=f"test accuracy, {MEASURES[data['measure']]}")
    axes.legend(fontsize=8, ncols=3)
    return figure
