"""Study of the answers' entropy: do the answers become certain, equal to each other, or repetitive?"""

from __future__ import annotations

from typing import Any

from embedgrad.compare.runner import Runner
from embedgrad.compare.studies.pictures import BLUE, GREEN, GREY, VERMILION, whole_numbers
from embedgrad.compare.studies.study import Finding, Study, optimised, original, validations_of

SHOWN = {
    "token_entropy": ("token entropy", BLUE),
    "answer_entropy": ("entropy of the answers, over the targets'", GREEN),
    "trajectory_entropy": ("trajectory entropy of long answers", VERMILION),
}
ALARM = 0.05


def run(runner: Runner) -> Finding:
    """Statistics of the answers to all test items before and after, and to some validation items in between."""
    import matplotlib.pyplot as plt

    before = original(runner)
    outcome, records = optimised(runner)
    seen = [record for record in validations_of(records) if "answers" in record]
    data: dict[str, Any] = {
        "before": before.answers, "after": outcome.answers,
        "step": [record["step"] for record in seen],
        "answers_each": [record["answers"]["answers"] for record in seen],
        **{name: [record["answers"][name] for record in seen] for name in (*SHOWN, "collapse")},
    }  # fmt: skip
    figure, axes = plt.subplots(figsize=(6.5, 3.2))
    for name, (label, colour) in SHOWN.items():
        known = [(s, v) for s, v in zip(data["step"], data[name], strict=True) if v is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, marker="o", label=label)
    axes.axhline(ALARM, color=GREY, linestyle=":", label=f"the paper's sign of collapse, {ALARM:g}")
    axes.set(xlabel="step", ylabel="share of the largest possible", ylim=(-0.03, 1.03))
    axes.legend(fontsize=8)
    whole_numbers(axes)
    return Finding(data, _paragraph(data), figure)


def _paragraph(data: dict[str, Any]) -> str:
    before, after = data["before"], data["after"]
    told = (
        f"Over {after['answers']} test answers the mean token entropy went from {before['token_entropy']:.3f} to "
        f"{after['token_entropy']:.3f} of the largest possible, their mean length from {before['tokens']:.1f} to "
        f"{after['tokens']:.1f} tokens, the entropy of the answers as whole texts from {before['answer_entropy']:.2f} "
        f"to {after['answer_entropy']:.2f} of the targets' own, and the share that ends in a loop from "
        f"{before['loops']:.1%} to {after['loops']:.1%}. "
    )
    if after["trajectory_entropy"] is None:
        told += (
            "No answer is long enough (16 tokens) for a trajectory entropy that means anything; a one-word answer "
            "repeats nothing, and the paper's threshold of 0.05 is held against the entropy of the answers instead: "
        )
    else:
        told += f"The trajectory entropy of the {after['long']} long answers is {after['trajectory_entropy']:.3f}: "
    lowest, looked_at = min(data["collapse"]), min(data["answers_each"])
    verdict = "below" if lowest < ALARM else "never below"
    return told + f"{verdict} the threshold, {lowest:.2f} at its lowest, over {looked_at} answers at each validation."


STUDY = Study("entropy of the answers before and after (the paper: no repetition)", run)
