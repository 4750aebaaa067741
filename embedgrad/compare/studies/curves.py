"""Study of training and validation accuracy over the steps: when does accuracy rise, and does the prompt overfit?"""

from __future__ import annotations

from typing import Any

from embedgrad.compare.runner import Runner
from embedgrad.compare.studies.pictures import BLUE, GREY, VERMILION, whole_numbers
from embedgrad.compare.studies.study import Finding, Study, main_measure, optimised, original, share, steps_of
from embedgrad.compare.studies.study import validations_of as validations
from embedgrad.evaluation.statistics import Accuracy, in_percent


def run(runner: Runner) -> Finding:
    """The losses and accuracies of one optimisation."""
    import matplotlib.pyplot as plt

    before = original(runner)
    outcome, records = optimised(runner)
    steps, seen = steps_of(records), validations(records)
    measure = main_measure(outcome)
    data: dict[str, Any] = {
        "step": [r["step"] for r in steps], "train_loss": [r["loss"] for r in steps],
        "validation_step": [r["step"] for r in seen], "validation_accuracy": [r["accuracy"] for r in seen],
        "validation_loss": [r["loss"] for r in seen], "train_accuracy": [r.get("train_accuracy") for r in seen],
        "gap": [r.get("gap") for r in seen], "gap_low": [r.get("gap_low") for r in seen],
        "epochs": steps[-1]["epoch"], "best_step": outcome.best_step,
        "alarms": outcome.alarms, "measure": measure,
        "test_before": vars(share(before, measure)), "test_after": vars(share(outcome, measure)),
    }  # fmt: skip
    figure, (losses, shares) = plt.subplots(1, 2, figsize=(8.5, 3.2))
    losses.plot(data["step"], data["train_loss"], color=BLUE, linewidth=1, alpha=0.7, label="batch")
    losses.plot(data["validation_step"], data["validation_loss"], color=VERMILION, marker="o", label="validation")
    losses.set(xlabel="step", ylabel="loss, nats per target token", yscale="log")
    known = [(s, a) for s, a in zip(data["validation_step"], data["train_accuracy"], strict=True) if a is not None]
    if known:
        shares.plot(*zip(*known, strict=True), color=BLUE, marker="o", label="training")
    shares.plot(data["validation_step"], data["validation_accuracy"], color=VERMILION, marker="o", label="validation")
    shares.axvline(outcome.best_step or 0, color=GREY, linestyle=":", label="chosen")
    shares.set(xlabel="step", ylabel="accuracy of the answer", ylim=(-0.03, 1.03))
    for axes in (losses, shares):
        axes.legend()
    whole_numbers(losses, shares)
    return Finding(data, _paragraph(data), figure)


def _paragraph(data: dict[str, Any]) -> str:
    first, last = data["validation_accuracy"][0], data["validation_accuracy"][-1]
    best = max(data["validation_accuracy"])
    told = (
        f"Validation accuracy went from {first:.1%} to {last:.1%} in {data['step'][-1]} steps ({data['epochs']} "
        f"{'epoch' if data['epochs'] == 1 else 'epochs'}), {best:.1%} at its best; the loss of the batches from "
        f"{data['train_loss'][0]:.3f} to {data['train_loss'][-1]:.3f}, of the validation data from "
        f"{data['validation_loss'][0]:.3f} to {data['validation_loss'][-1]:.3f}. "
    )
    gap, low = data["gap"][-1], data["gap_low"][-1]
    if gap is not None:
        side, certain = ("above", low > 0) if gap > 0 else ("below", True)
        told += f"Training accuracy ended {100 * abs(gap):.1f} points {side} validation accuracy"
        told += ". " if certain else ", which may be chance (its 95 % interval holds 0). "
    fired = [alarm["sign"] for alarm in data["alarms"]]
    told += "The gap alarm went off. " if "gap" in fired else "The gap alarm (more than 15 points) stayed silent. "
    before, after = (Accuracy(**data[name]) for name in ("test_before", "test_after"))
    what = "the likeliest label" if data["measure"] == "choice_accuracy" else "the answer as generated"
    return told + f"On the test items {what} is right in {in_percent(before)} before and {in_percent(after)} after."


STUDY = Study("training against validation accuracy over the steps", run)
