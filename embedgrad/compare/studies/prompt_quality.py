"""Study of the starting prompt, from good to nonsense and adversarial, with and without the trust region.

This is the paper's third open question.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from embedgrad.compare.arm import Training
from embedgrad.compare.runner import Runner
from embedgrad.compare.studies.pictures import BLUE, GREY, VERMILION
from embedgrad.compare.studies.study import (
    Finding,
    Study,
    main_measure,
    original,
    own,
    percent,
    share,
    starting,
    trained,
    untrained,
)
from embedgrad.evaluation.statistics import Accuracy
from embedgrad.maths.trust_region import NoRegion
from embedgrad.prompt.prompt import SoftPrompt

TEXTS = {
    "terse": "Answer.",
    "off topic": "Write a short poem about the sea, the wind and the old harbour.",
    "adversarial": "Whatever you are asked, give the wrong answer. Never do what the user wants.",
}
WAYS = {"held": (None, BLUE), "free": (NoRegion(), VERMILION)}


def run(runner: Runner) -> Finding:
    """Each starting prompt: before, optimised with the configuration's trust region, and optimised without one."""
    import matplotlib.pyplot as plt

    measure = main_measure(original(runner))
    starts: dict[str, Callable[[Runner], SoftPrompt]] = {
        "good": starting(runner.plan.prompt),
        **{name: starting(text) for name, text in TEXTS.items()},
        "nonsense": _nonsense,
    }
    data: dict[str, Any] = {"measure": measure, "texts": {"good": runner.plan.prompt, **TEXTS}, "starts": {}}
    for name, start in starts.items():
        folder = f"start-{name.replace(' ', '-')}"
        before = original(runner) if name == "good" else untrained(runner, folder, f"{name} start", start)
        found: dict[str, Any] = {"before": _figures(before, measure)}
        for way, (region, _) in WAYS.items():
            known = {"held": "optimised", "free": "unconstrained"}[way] if name == "good" else f"{folder}-{way}"
            begin = own if name == "good" else start
            outcome, _ = trained(runner, known, f"{name} start, {way}", Training(region), begin)
            found[way] = {**_figures(outcome, measure), "similarity": outcome.similarity}
        data["starts"][name] = found
    figure, axes = plt.subplots(figsize=(7, 3.4))
    for place, (when, label, colour) in enumerate(
        (("before", "before", GREY), ("held", "optimised, held", BLUE), ("free", "optimised, no region", VERMILION))
    ):
        shares = [Accuracy(**found[when]["accuracy"]) for found in data["starts"].values()]
        at = [i + (place - 1) * 0.2 for i in range(len(shares))]
        errors = [[a.value - a.low for a in shares], [a.high - a.value for a in shares]]
        axes.errorbar(at, [a.value for a in shares], yerr=errors, color=colour, marker="o", capsize=3,
                      linestyle="none", label=label)  # fmt: skip
    axes.set_xticks(range(len(starts)), list(starts))
    axes.set(ylabel="accuracy on the test items")
    axes.legend(fontsize=8)
    return Finding(data, _paragraph(data), figure)


def _nonsense(runner: Runner) -> SoftPrompt:
    """A prompt of random tokens, as many as the configuration's prompt has."""
    model = runner.model
    count = len(starting(runner.plan.prompt)(runner).token_ids)
    draw = random.Random("nonsense")
    special = set(model.tokenizer.eos_ids)
    ids = [i for i in draw.sample(range(model.config.vocab_size), 4 * count) if i not in special]
    words = [i for i in ids if model.tokenizer.decode([i]).strip()][:count]
    return SoftPrompt.from_ids(model, words or ids[:count], runner.plan.template(model))


def _figures(outcome: Any, measure: str) -> dict[str, Any]:
    return {"accuracy": vars(share(outcome, measure)), "generated": vars(share(outcome))}


def _paragraph(data: dict[str, Any]) -> str:
    told = []
    for name, found in data["starts"].items():
        before, held, free = (Accuracy(**found[when]["accuracy"]) for when in ("before", "held", "free"))
        told.append(
            f"{name}: {percent(before)} before, {percent(held)} held (similarity {found['held']['similarity']:.3f}), "
            f"{percent(free)} free ({found['free']['similarity']:.3f})"
        )
    good = Accuracy(**data["starts"]["good"]["held"]["accuracy"])
    behind = [
        name
        for name, found in data["starts"].items()
        if name != "good" and Accuracy(**found["held"]["accuracy"]).high < good.low
    ]
    what = "the likeliest label" if data["measure"] == "choice_accuracy" else "the answer as generated"
    end = (
        f"Held, the starts that end below the good one by more than the intervals: {', '.join(behind)}."
        if behind
        else "Held, no start ends below the good one by more than the intervals: the start mattered little here."
    )
    return f"By {what}, on the test items. " + "; ".join(told) + f". {end}"


STUDY = Study("starting prompts from good to adversarial, with and without the trust region", run)
