"""Study of drift at ten to a hundred times the usual learning rate: what does the trust region prevent?"""

from __future__ import annotations

from typing import Any

from embedgrad.compare.arm import Training
from embedgrad.compare.runner import Runner
from embedgrad.compare.studies.pictures import BLUE, GREY, VERMILION, whole_numbers
from embedgrad.compare.studies.study import Finding, Study, main_measure, original, share, steps_of, trained
from embedgrad.evaluation.statistics import Accuracy, in_percent
from embedgrad.maths.trust_region import CosineCone, NoRegion

RATE, SIGN = 0.1, 0.90
TAU = 0.95


def run(runner: Runner) -> Finding:
    """The same number of steps at learning rate RATE, with a cone of τ = TAU and without a trust region."""
    import matplotlib.pyplot as plt

    before = original(runner)
    measure = main_measure(before)
    ways = {
        "held": ("drift-held", f"learning rate {RATE:g}, τ = {TAU:g}", CosineCone(TAU), BLUE),
        "free": ("drift-free", f"learning rate {RATE:g}, no trust region", NoRegion(), VERMILION),
    }
    data: dict[str, Any] = {"rate": RATE, "tau": TAU, "measure": measure, "before": vars(share(before, measure))}
    figure, axes = plt.subplots(figsize=(6.5, 3.2))
    for way, (name, title, region, colour) in ways.items():
        outcome, records = trained(runner, name, title, Training(region, learning_rate=RATE))
        steps = steps_of(records)
        data[way] = {
            "step": [r["step"] for r in steps], "least": [r["similarity_min"] for r in steps],
            "mean": [r["similarity_mean"] for r in steps], "loss": [r["loss"] for r in steps],
            "best_step": outcome.best_step, "best_least": outcome.similarity, "after": vars(share(outcome, measure)),
            "alarms": [alarm["sign"] for alarm in outcome.alarms],
        }  # fmt: skip
        axes.plot(data[way]["step"], data[way]["least"], color=colour, label=title)
    axes.axhline(SIGN, color=GREY, linestyle=":", label=f"the paper's sign of drift, {SIGN:g}")
    axes.set(xlabel="step", ylabel="lowest cosine with the anchor")
    axes.legend(fontsize=8)
    whole_numbers(axes)
    return Finding(data, _paragraph(data), figure)


def _paragraph(data: dict[str, Any]) -> str:
    held, free = data["held"], data["free"]
    lowest_free, lowest_held = min(free["least"]), min(held["least"])
    first = next((s for s, value in zip(free["step"], free["least"], strict=True) if value < SIGN), None)
    told = f"At a learning rate of {RATE:g} without a trust region the lowest similarity fell to {lowest_free:.3f}"
    told += f", below {SIGN:g} after step {first}" if first is not None else f", which is not below {SIGN:g}"
    alarm = "went off" if "similarity" in free["alarms"] else "did not go off"
    told += f"; the similarity alarm {alarm}. With the cone of τ = {TAU:g} it never fell below {lowest_held:.4f}. "
    before, after_held, after_free = (Accuracy(**x) for x in (data["before"], held["after"], free["after"]))
    what = "The likeliest label is" if data["measure"] == "choice_accuracy" else "The answer as generated is"
    told += (
        f"{what} right in {in_percent(before)} of the test items before, {in_percent(after_held)} after with the cone "
        f"and {in_percent(after_free)} without (each at its best validation). "
    )
    if after_free.low > after_held.high:
        return told + "Here the drift did not cost accuracy: the prompt that drifted is the better one."
    if after_held.low > after_free.high:
        return told + "The prompt that drifted is also the worse one."
    return told + "The intervals overlap: by accuracy alone neither is better."


STUDY = Study("drift at a learning rate of 0.1 with and without the trust region", run)
