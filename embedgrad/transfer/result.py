"""What a transfer came to: accuracies on the target, curves, steps to an accuracy, and words that follow from them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from embedgrad.compare.outcome import Outcome
from embedgrad.evaluation.evaluate import MEASURES
from embedgrad.evaluation.paired import gain
from embedgrad.evaluation.statistics import Accuracy, McNemar, in_percent
from embedgrad.transfer.arms import TEXT, TRAINED
from embedgrad.transfer.carry import SHUFFLED

FILE = "transfer.json"
LEVELS = (0.5, 0.75, 0.95)  # shares of the way from the text's accuracy to the best that training from the text reached
Values = dict[str, Any]
Curve = Sequence[tuple[int, float]]
"""(step, validation accuracy) in ascending order of the steps."""


def steps_to(curve: Curve, level: float) -> int | None:
    """The first validated step with an accuracy of at least `level`; None where none has it."""
    return next((step for step, accuracy in curve if accuracy >= level), None)


def area(curve: Curve) -> float:
    """The mean accuracy over the steps, by trapezoids: 1 for a curve that is right from the start."""
    if len(curve) < 2:
        return curve[0][1] if curve else 0.0
    whole = sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairwise(curve))
    return whole / (curve[-1][0] - curve[0][0])


def levels(text: Sequence[Curve], wanted: float | None) -> list[float]:
    """The accuracies that are looked for: `wanted`, or LEVELS of what training from the text gained (means of the
    seeds)."""
    if wanted is not None:
        return [wanted]
    start = statistics.fmean(curve[0][1] for curve in text)
    best = statistics.fmean(max(accuracy for _, accuracy in curve) for curve in text)
    return [start + share * (best - start) for share in LEVELS]


def result(
    outcomes: Sequence[Outcome], curves: Mapping[str, Sequence[Curve]], wanted: float | None, about: Values
) -> Values:
    """All figures. curves: {start: one curve a seed}. about: models, shared tokens, fits, settings, warnings.

    "arms" has for each outcome its accuracies on the test items, and for those of the first seed the paired gain on
    the text's outcome of the same kind (as it is, or trained). "curves" has for each start the curves, their areas,
    and the steps to each of "levels".
    """
    sought = levels(curves[TEXT], wanted)
    first = {outcome.arm: outcome for outcome in reversed(outcomes)}  # of the first seed
    arms = []
    for outcome in outcomes:
        beside = first[TEXT + TRAINED if outcome.arm.endswith(TRAINED) else TEXT]
        paired = {}
        if outcome is first[outcome.arm] and outcome is not beside:
            for measure, verdicts in outcome.correct.items():
                test = McNemar.of(beside.correct[measure], verdicts)
                paired[measure] = {**asdict(gain(beside.correct[measure], verdicts)), "p": test.p}
        arms.append({
            "arm": outcome.arm, "title": outcome.title, "seed": outcome.seed,
            "accuracy": {m: asdict(Accuracy.of(verdicts)) for m, verdicts in outcome.correct.items()},
            "against_text": paired, "similarity": outcome.similarity,
        })  # fmt: skip
    told = {
        name: {
            "curves": [[list(point) for point in curve] for curve in found],
            "area": [area(curve) for curve in found],
            "steps_to": [[steps_to(curve, level) for level in sought] for curve in found],
        }
        for name, found in curves.items()
    }
    return {**about, "arms": arms, "levels": sought, "curves": told}


def header(found: Values) -> list[str]:
    """The headings of `rows`."""
    measures = _measures(found)
    sought = [f"steps to {level:.1%}" for level in found["levels"]]
    return [
        "start", *(f"as it is: {MEASURES[m]}" for m in measures), *(f"trained: {MEASURES[m]}" for m in measures),
        "area of the curve", *sought,
    ]  # fmt: skip


def rows(found: Values) -> list[list[str]]:
    """One row for each start: means over the seeds, and every seed's number of steps."""
    table = []
    for start, curve in found["curves"].items():
        cells = [next(one["title"] for one in found["arms"] if one["arm"] == start)]
        for arm in (start, start + TRAINED):
            cells += [_accuracy([one for one in found["arms"] if one["arm"] == arm], m) for m in _measures(found)]
        areas = curve["area"]
        spread = f" ± {statistics.stdev(areas):.3f}" if len(areas) > 1 else ""
        cells.append(f"{statistics.fmean(areas):.3f}{spread}")
        for level in range(len(found["levels"])):
            steps = [one[level] for one in curve["steps_to"]]
            cells.append(", ".join("never" if step is None else str(step) for step in steps))
        table.append(cells)
    return table


def _measures(found: Values) -> list[str]:
    return [m for m in ("generated_accuracy", "choice_accuracy") if m in found["arms"][0]["accuracy"]]


def _accuracy(arms: Sequence[Values], measure: str) -> str:
    shares = [one["accuracy"][measure] for one in arms]
    if len(shares) == 1:
        return in_percent(shares[0])
    values = [100 * share["value"] for share in shares]
    return f"{statistics.fmean(values):.1f} % ± {statistics.stdev(values):.1f}"


def paragraph(found: Values) -> str:
    """What came out, in words."""
    told = [
        f"{found['source']} and {found['target']} share {found['shared_tokens']:,} tokens; the prompt has "
        f"{found['source_tokens']} tokens there and {found['target_tokens']} here."
    ]
    fits = [f"{name} {fit['cosine']:.2f}" for name, fit in found["fits"].items() if fit is not None]
    if fits:
        told.append(f"Mean cosine of mapped and true embeddings on held-out tokens: {', '.join(fits)}.")
    told.append(_as_it_is(found))
    told.append(_trained(found))
    return " ".join(told)


def _as_it_is(found: Values) -> str:
    measure = _measures(found)[-1]  # the likeliest label where there are labels: it leaves the answer's format out
    better: list[str] = []
    worse: list[str] = []
    for one in found["arms"]:
        paired = one["against_text"].get(measure)
        if one["arm"] in found["fits"] and paired is not None:
            (better if paired["low"] > 0 else worse if paired["high"] < 0 else []).append(one["arm"])
    end = f"by {MEASURES[measure]}, as it is"
    if not better and not worse:
        return f"No transferred prompt differs from the text by more than its interval ({end})."
    parts = [f"better than the text: {', '.join(better)}"] if better else []
    parts += [f"worse than the text: {', '.join(worse)}"] if worse else []
    return f"Transferred, {'; '.join(parts)} ({end})."


def _trained(found: Values) -> str:
    curves = found["curves"]
    text, control = curves[TEXT]["area"], curves[SHUFFLED]["area"]
    helped = [
        name
        for name in found["fits"]
        if min(curves[name]["area"]) > max(text) and min(curves[name]["area"]) > max(control)
    ]
    seeds = "with the one seed" if len(text) == 1 else f"in every one of {len(text)} seeds"
    if not helped:
        return (
            "Training from a transferred prompt was not ahead of training from the text and from the shuffled control "
            f"{seeds}: that anything of the displacement transfers is not shown."
        )
    return (
        f"{seeds[0].upper()}{seeds[1:]}, training was ahead of that from the text and from the shuffled control (area "
        f"of the curve) from: {', '.join(helped)}."
    )


def markdown(found: Values) -> str:
    """The page transfer.md."""
    head = header(found)
    lines = ["# Transfer", "", paragraph(found), ""]
    lines += [f"> {warning}\n" for warning in found["warnings"]]
    lines += ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(found)]
    lines += [
        "", f"{found['test_items']} test items, {found['validation_items']} validation items for the curves. "
        "One seed: 95 % Wilson intervals; several: mean ± standard deviation.",
        "", "![validation accuracy over the steps](transfer.svg)",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
