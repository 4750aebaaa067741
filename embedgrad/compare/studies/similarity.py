"""Study of the similarity to the anchor: does the trust region hold, and does the optimisation reach its boundary?"""

from __future__ import annotations

from typing import Any

from embedgrad.compare.runner import Runner
from embedgrad.compare.studies.pictures import BLUE, GREY, SKY, VERMILION, whole_numbers
from embedgrad.compare.studies.study import Finding, Study, optimised, steps_of

PAPER = 0.95


def run(runner: Runner) -> Finding:
    """The cosine of every prompt row with its anchor, over the steps and at the end."""
    import matplotlib.pyplot as plt

    outcome, records = optimised(runner)
    steps = steps_of(records)
    tau = getattr(runner.plan.config.optimize.trust_region, "tau", None)
    last = steps[-1]
    data = {
        "tau": tau,
        "step": [record["step"] for record in steps],
        "least": [record["similarity_min"] for record in steps],
        "mean": [record["similarity_mean"] for record in steps],
        "on_boundary": [record["on_boundary"] for record in steps],
        "last": last["similarity"],
        "best_step": outcome.best_step,
        "best_least": outcome.similarity,
    }
    figure, (over, rows) = plt.subplots(1, 2, figsize=(8.5, 3.2))
    over.fill_between(data["step"], data["least"], 1, color=SKY, alpha=0.3, linewidth=0)
    over.plot(data["step"], data["least"], color=BLUE, label="lowest token")
    over.plot(data["step"], data["mean"], color=BLUE, linestyle="--", label="mean")
    if tau is not None:
        over.axhline(tau, color=GREY, linestyle=":", label=f"τ = {tau:g}")
    over.set(xlabel="step", ylabel="cosine with the anchor")
    over.legend()
    colours = [VERMILION if tau is not None and value < tau + 1e-3 else BLUE for value in last["similarity"]]
    rows.bar(range(len(last["similarity"])), [1 - value for value in last["similarity"]], color=colours)
    rows.set(xlabel="prompt token", ylabel="1 − cosine after the last step")
    whole_numbers(over, rows)
    return Finding(data, _paragraph(data, len(steps)), figure)


def _paragraph(data: dict[str, Any], steps: int) -> str:
    lowest, best = min(data["least"]), data["best_least"]
    kept = "kept" if best >= PAPER else "not kept"
    moved = sum(value < 1 - 1e-3 for value in data["last"])
    told = (
        f"Before the first step every token has similarity 1. Over {steps} steps the lowest of any token was "
        f"{lowest:.4f}; the best prompt (step {data['best_step']}) has {best:.4f}: the paper's claim of more than "
        f"{PAPER:g} is {kept}. "
    )
    if data["tau"] is not None:
        boundary = data["on_boundary"][-1]
        told += f"After the last step {boundary:.0%} of the tokens lie on the cone of τ = {data['tau']:g}, "
        told += "so the region binds. " if boundary > 0 else "so it was the steps' size that kept them inside. "
    return told + f"{moved} of {len(data['last'])} tokens moved by more than 0.001."


STUDY = Study("similarity to the anchor before and after (the paper: more than 0.95 is kept)", run)
