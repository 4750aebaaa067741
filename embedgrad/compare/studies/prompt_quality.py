"""Study of the starting prompt, from good to adversarial: can it be mended, and does the trust region stand in the way?

This is the paper's third open question. Every start is optimised in a wide and a narrow cone and without a region, and
searched discretely by both searches, each of which may spend the tokens that the narrow cone's optimisation spent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from embedgrad.compare.arm import Arm, Candidates, Training, only
from embedgrad.compare.arms import OPTIMISED
from embedgrad.compare.outcome import Outcome
from embedgrad.compare.runner import Runner
from embedgrad.compare.studies.pictures import BLUE, GREEN, GREY, ORANGE, SKY, VERMILION
from embedgrad.compare.studies.study import (
    Finding,
    Study,
    main_measure,
    original,
    own,
    seeded,
    starting,
    untrained,
)
from embedgrad.evaluation.evaluate import MEASURES
from embedgrad.evaluation.paired import Estimate, gain
from embedgrad.evaluation.statistics import McNemar, in_percent, wilson
from embedgrad.maths.trust_region import CosineCone, NoRegion, TrustRegion
from embedgrad.prompt.prompt import SoftPrompt

GOOD, RANDOM = "good", "random tokens"
TEXTS = {
    "vague": "Please look at this and answer.",
    "wrong": "Count the words of the text. Answer with one number.",
    "other task": "Write a short poem about the sea, the wind and the old harbour.",
    "adversarial": "Whatever you are asked, answer the opposite of what is right.",
}
HELD = "cone 0.95"
REGIONS: dict[str, TrustRegion] = {HELD: CosineCone(0.95), "cone 0.8": CosineCone(0.8), "no region": NoRegion()}
SEARCHES = {"gcg": "gcg", "pez": "pez"}
COLOURS = dict(zip(("before", *REGIONS, *SEARCHES), (GREY, BLUE, SKY, VERMILION, GREEN, ORANGE), strict=True))
Start = Callable[[Runner], SoftPrompt]


def run(runner: Runner) -> Finding:
    """Each starting prompt: as it is, optimised in three regions, and searched in two ways, with every seed."""
    before = original(runner)
    measure = main_measure(before)
    starts: dict[str, Start] = {
        GOOD: starting(runner.plan.prompt),
        **{name: starting(text) for name, text in TEXTS.items()},
        RANDOM: _random,
    }
    data: dict[str, Any] = {
        "measure": measure, "texts": {GOOD: runner.plan.prompt, **TEXTS},
        "seeds": list(runner.plan.config.compare.seeds), "starts": {},
    }  # fmt: skip
    outcomes: dict[str, dict[str, list[Outcome]]] = {}
    for name, start in starts.items():
        folder = f"start-{name.replace(' ', '-')}"
        found = {"before": [before if name == GOOD else untrained(runner, folder, f"{name} start", start)]}
        begin = own if name == GOOD else start
        for way, region in REGIONS.items():
            arm = Arm(_known(runner, name, way) or f"{folder}-{way.replace(' ', '-')}", f"{name} start, {way}",
                      _one(runner, begin), Training(region))  # fmt: skip
            found[way] = seeded(runner, arm)
        budgets = {one.seed: one.forward_tokens + one.backward_tokens for one in found[HELD]}
        for way, search in SEARCHES.items():
            arm = Arm(f"{folder}-{way}", f"{name} start, {way}", _one(runner, start), search=search)
            found[way] = seeded(runner, arm, budgets)
        outcomes[name] = found
    good = outcomes[GOOD][HELD]
    for name, found in outcomes.items():
        data["starts"][name] = {way: _figures(runs, found, good, measure) for way, runs in found.items()}
    return Finding(data, _paragraph(data), _picture(data))


def _one(runner: Runner, start: Start) -> Candidates:
    return only(lambda model: start(runner))


def _known(runner: Runner, start: str, way: str) -> str | None:
    """The name of the comparison's own arm that is the same as this one, so that it is not run twice."""
    if start != GOOD:
        return None
    if REGIONS[way] == runner.plan.config.optimize.trust_region:
        return OPTIMISED
    return {"cone 0.95": "tau-0.95", "cone 0.8": "tau-0.8", "no region": "unconstrained"}[way]


def _random(runner: Runner) -> SoftPrompt:
    """A prompt of random tokens, as many as the configuration's prompt has."""
    model = runner.model
    count = len(starting(runner.plan.prompt)(runner).token_ids)
    draw = random.Random("nonsense")
    special = set(model.tokenizer.eos_ids)
    ids = [i for i in draw.sample(range(model.config.vocab_size), 4 * count) if i not in special]
    words = [i for i in ids if model.tokenizer.decode([i]).strip()][:count]
    return SoftPrompt.from_ids(model, words or ids[:count], runner.plan.template(model))


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


def _figures(
    runs: Sequence[Outcome], found: dict[str, list[Outcome]], good: Sequence[Outcome], measure: str
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
        "over_before": asdict(gain(_mean(found["before"], measure), _mean(runs, measure))),
        "over_held": asdict(gain(_mean(held, measure), _mean(runs, measure))),
        "over_good": asdict(gain(_mean(good, measure), _mean(runs, measure))),
        "p": max((test.p for test in tests), default=None),
    }  # fmt: skip


def _paragraph(data: dict[str, Any]) -> str:
    """Per start its figures; then what they mean for the question, each claim by an interval that leaves 0 out."""
    starts = data["starts"]
    told = [
        f"{name}: " + ", ".join(f"{way} {in_percent(one['accuracy'])}" for way, one in found.items())
        for name, found in starts.items()
    ]
    flawed = [name for name in starts if name != GOOD]
    gained = [n for n in flawed if Estimate(**starts[n][HELD]["over_before"]).low > 0]
    mended = [n for n in flawed if Estimate(**starts[n][HELD]["over_good"]).high >= 0]
    freed = [n for n in starts if Estimate(**starts[n]["no region"]["over_held"]).low > 0]
    worse = [n for n in starts if Estimate(**starts[n]["no region"]["over_held"]).high < 0]
    ends = [
        _claim(gained, "In the cone of 0.95 these flawed starts gain on themselves", "no flawed start gains on itself"),
        _claim(mended, "These end as high as the good start, within the interval", "all end below the good start"),
        _claim(freed, "Without a region these end higher than in that cone", "no start ends higher without a region"),
    ]
    if worse:
        ends.append(f"Without a region these end lower: {', '.join(worse)}.")
    for way in SEARCHES:
        over = [n for n in starts if Estimate(**starts[n][way]["over_held"]).low > 0]
        under = [n for n in starts if Estimate(**starts[n][way]["over_held"]).high < 0]
        ends.append(
            f"At the same number of tokens {way} ends above the cone from {_named(over)}, below it from "
            f"{_named(under)}."
        )
    seeds = len(data["seeds"])
    head = f"By {MEASURES[data['measure']]}, on the test items, means of {seeds} seed{'s' if seeds > 1 else ''}. "
    return head + "; ".join(told) + ". " + " ".join(ends)


def _claim(names: Sequence[str], some: str, none: str) -> str:
    return f"{some}: {', '.join(names)}." if names else f"{none[0].upper()}{none[1:]}."


def _named(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _picture(data: dict[str, Any]) -> Any:
    import matplotlib.pyplot as plt

    starts = data["starts"]
    figure, axes = plt.subplots(figsize=(8.5, 3.6))
    for place, (way, colour) in enumerate(COLOURS.items()):
        shares = [found[way]["accuracy"] for found in starts.values()]
        at = [i + (place - (len(COLOURS) - 1) / 2) * 0.13 for i in range(len(shares))]
        errors = [[a["value"] - a["low"] for a in shares], [a["high"] - a["value"] for a in shares]]
        axes.errorbar(at, [a["value"] for a in shares], yerr=errors, color=colour, marker="o", capsize=2,
                      markersize=4, linestyle="none", label=way)  # fmt: skip
    axes.set_xticks(range(len(starts)), list(starts))
    axes.set(ylabel="accuracy on the test items")
    axes.legend(fontsize=8, ncols=3)
    return figure


STUDY = Study("starting prompts from good to adversarial: in cones, without a region, and by discrete search", run)
