"""Study of the trust region's size: cones from a ray (τ = 1) to a half-space (τ = 0), and no region."""

from __future__ import annotations

from typing import Any

from embedgrad.compare.arm import Training
from embedgrad.compare.runner import Runner
from embedgrad.compare.studies.pictures import BLUE, GREY, SKY
from embedgrad.compare.studies.study import Finding, Study, main_measure, optimised, original, share, trained
from embedgrad.evaluation.statistics import Accuracy, in_percent
from embedgrad.maths.trust_region import CosineCone, NoRegion

NONE = "none"


def run(runner: Runner) -> Finding:
    """One optimisation for each τ in compare.taus, and one without a trust region."""
    import matplotlib.pyplot as plt

    before = original(runner)
    measure = main_measure(before)
    region = runner.plan.config.optimize.trust_region
    points: list[dict[str, Any]] = []
    for tau in sorted(runner.plan.config.compare.taus, reverse=True):
        if CosineCone(tau) == region:
            outcome, _ = optimised(runner)
        else:
            outcome, _ = trained(runner, f"tau-{tau:g}", f"cone of τ = {tau:g}", Training(CosineCone(tau)))
        points.append(_point(f"{tau:g}", outcome, measure))
    outcome, _ = trained(runner, "unconstrained", "no trust region", Training(NoRegion()))
    points.append(_point(NONE, outcome, measure))
    data = {"measure": measure, "before": vars(share(before, measure)), "points": points}
    figure, (shares, kept) = plt.subplots(1, 2, figsize=(8.5, 3.2))
    names, at = [point["tau"] for point in points], list(range(len(points)))
    accuracies = [Accuracy(**point["accuracy"]) for point in points]
    errors = [[a.value - a.low for a in accuracies], [a.high - a.value for a in accuracies]]
    shares.errorbar(at, [a.value for a in accuracies], yerr=errors, color=BLUE, marker="o", capsize=3, linestyle="none")
    shares.axhline(share(before, measure).value, color=GREY, linestyle=":", label="before")
    shares.set(xlabel="τ", ylabel="accuracy on the test items")
    shares.legend()
    kept.bar(at, [point["similarity"] for point in points], color=SKY)
    kept.set(xlabel="τ", ylabel="lowest cosine with the anchor", ylim=(min(0.9, *(p["similarity"] for p in points)), 1))
    for axes in (shares, kept):
        axes.set_xticks(at, names)
    return Finding(data, _paragraph(data), figure)


def _point(tau: str, outcome: Any, measure: str) -> dict[str, Any]:
    return {
        "tau": tau, "accuracy": vars(share(outcome, measure)), "generated": vars(share(outcome)),
        "similarity": outcome.similarity, "best_step": outcome.best_step,
    }  # fmt: skip


def _paragraph(data: dict[str, Any]) -> str:
    before = Accuracy(**data["before"])
    points = [(point, Accuracy(**point["accuracy"])) for point in data["points"]]
    best = max(points, key=lambda pair: pair[1].value)
    alike = [point["tau"] for point, accuracy in points if accuracy.high >= best[1].low]
    what = "the likeliest label" if data["measure"] == "choice_accuracy" else "the answer as generated"
    told = (
        f"By {what} the original text is right in {in_percent(before)} of the test items; the best region here is τ = "
        f"{best[0]['tau']} with {in_percent(best[1])} and a lowest similarity of {best[0]['similarity']:.4f}. "
        f"The intervals of τ = {', '.join(alike)} overlap with its own, so that nothing is known between them. "
    )
    free = points[-1]
    told += f"Without a region the lowest similarity came to {free[0]['similarity']:.4f} "
    unused = [point["tau"] for point, _ in points[:-1] if point["similarity"] > float(point["tau"]) + 1e-3]
    told += f"at {in_percent(free[1])}. "
    if unused:
        told += f"At τ = {', '.join(unused)} the prompt stayed off the boundary: the region did not bind."
    return told.rstrip()


STUDY = Study("accuracy and similarity for a sweep of τ", run)
