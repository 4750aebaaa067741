"""Study of the starting prompt, from good to adversarial: can it be mended, and does the trust region stand in the way?

This is the paper's third open question. Every start is optimised in a wide and a narrow cone and without a region, and
searched discretely by both searches, each of which may spend the tokens that the narrow cone's optimisation spent.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from embedgrad.compare.arm import Arm, Candidates, Training, only
from embedgrad.compare.arms import OPTIMISED, ORIGINAL
from embedgrad.compare.outcome import Outcome
from embedgrad.compare.runner import Runner, tokens
from embedgrad.compare.studies.prompt_quality_result import (
    BEFORE,
    FREE,
    GOOD,
    HELD,
    SEARCHES,
    WIDE,
    figures,
    paragraph,
    picture,
    table,
)
from embedgrad.compare.studies.study import Finding, Study, main_measure, own, starting
from embedgrad.evaluation.evaluate import MEASURES
from embedgrad.evaluation.statistics import Accuracy, in_percent
from embedgrad.maths.trust_region import CosineCone, NoRegion, TrustRegion
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.util.errors import ConfigError

RANDOM = "random tokens"
TEXTS = {
    "vague": "Please look at this and answer.",
    "wrong": "Count the words of the text. Answer with one number.",
    "other task": "Write a short poem about the sea, the wind and the old harbour.",
    "adversarial": "Whatever you are asked, answer the opposite of what is right.",
}
STARTS = (GOOD, *TEXTS, RANDOM)
REGIONS: dict[str, TrustRegion] = {HELD: CosineCone(0.95), WIDE: CosineCone(0.8), FREE: NoRegion()}
WAYS = (*REGIONS, *SEARCHES)
Start = Callable[[Runner], SoftPrompt]


@dataclass(frozen=True)
class Grid:
    """What the study runs.

    starts: some of STARTS; the good one is always among them. ways: some of WAYS; the narrow cone is always among them,
    because the others are compared with it and spend what it spent. seeds: None: the configuration's. say: told the
    size of the work before it begins, and each outcome.
    """

    starts: Sequence[str] = STARTS
    ways: Sequence[str] = WAYS
    seeds: Sequence[int] | None = None
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        """Raises ConfigError for a start or a way that there is not."""
        for name, all_of, what in ((self.starts, STARTS, "start"), (self.ways, WAYS, "arm")):
            unknown = [one for one in name if one not in all_of]
            if unknown:
                raise ConfigError(f"there is no {what} {unknown[0]!r}; choose among {', '.join(all_of)}.")


def run(runner: Runner, grid: Grid | None = None) -> Finding:
    """Each starting prompt: as it is, optimised in up to three regions, and searched in up to two ways."""
    grid = Grid() if grid is None else grid
    starts = [name for name in STARTS if name == GOOD or name in grid.starts]
    ways = [way for way in WAYS if way == HELD or way in grid.ways]
    seeds = runner.plan.config.compare.seeds if grid.seeds is None else grid.seeds
    found: dict[str, dict[str, list[Outcome]]] = {name: {way: [] for way in (BEFORE, *ways)} for name in starts}
    for name, way, outcome in _outcomes(runner, starts, ways, seeds, grid.say):
        found[name][way].append(outcome)
    measure = main_measure(found[GOOD][BEFORE][0])
    texts = {GOOD: runner.plan.prompt, **TEXTS}
    data: dict[str, Any] = {
        "measure": measure, "texts": {name: texts[name] for name in starts if name in texts}, "seeds": list(seeds),
        "starts": {
            name: {way: figures(runs, own_runs, found[GOOD][HELD], measure) for way, runs in own_runs.items()}
            for name, own_runs in found.items()
        },
    }  # fmt: skip
    return Finding(data, paragraph(data), picture(data), table(data))


def _outcomes(
    runner: Runner, starts: Sequence[str], ways: Sequence[str], seeds: Sequence[int], say: Callable[[str], None]
) -> Iterator[tuple[str, str, Outcome]]:
    """(start, way, outcome) of all runs. Seed by seed, so that what is there after each seed answers the question."""
    jobs = [(name, BEFORE, runner.plan.config.compare.seeds[0]) for name in starts]
    jobs += [(name, way, seed) for seed in seeds for way in ways for name in starts]
    todo = [job for job in jobs if not runner.done(_arm(runner, *job[:2]).name, job[2], runner.folds[0])]
    if todo:
        say(f"prompt-quality: {len(todo)} of {len(jobs)} runs to do, {_size(runner, todo)}")
    held: dict[tuple[str, int], int] = {}
    began, over = time.monotonic(), 0
    for name, way, seed in jobs:
        outcome = runner.run(_arm(runner, name, way), seed, runner.folds[0], held.get((name, seed)))
        if way == HELD:
            held[name, seed] = outcome.forward_tokens + outcome.backward_tokens
        if (name, way, seed) in todo:
            over += 1
            left = (time.monotonic() - began) / over * (len(todo) - over) / 60
            say(f"{over}/{len(todo)} {name} start, {way}, seed {seed}: {_told(outcome)}; about {left:.0f} min left")
        yield name, way, outcome


def _arm(runner: Runner, name: str, way: str) -> Arm:
    """The arm of one start and way. What is one of the comparison's own arms has its name, and is run once for both."""
    folder, slug = f"start-{name.replace(' ', '-')}", way.replace(" ", "-")
    start = _start(runner, name)
    title = f"{name} start, {way}"
    if way == BEFORE:
        return Arm(ORIGINAL if name == GOOD else folder, f"{name} start", _one(runner, start))
    if way in SEARCHES:
        return Arm(f"{folder}-{way}", title, _one(runner, start), search=way)
    region = REGIONS[way]
    if name == GOOD:
        known = {HELD: "tau-0.95", WIDE: "tau-0.8", FREE: "unconstrained"}[way]
        known = OPTIMISED if region == runner.plan.config.optimize.trust_region else known
        return Arm(known, title, _one(runner, own), Training(region))
    return Arm(f"{folder}-{slug}", title, _one(runner, start), Training(region))


def _start(runner: Runner, name: str) -> Start:
    if name == RANDOM:
        return _random
    return starting(runner.plan.prompt if name == GOOD else TEXTS[name])


def _one(runner: Runner, start: Start) -> Candidates:
    return only(lambda model: start(runner))


def _size(runner: Runner, todo: Sequence[tuple[str, str, int]]) -> str:
    """The tokens of the runs that are to be done, by the lengths of the data with the good start."""
    parts, config = runner.parts(runner.folds[0]), runner.plan.config.optimize
    prompt = starting(runner.plan.prompt)(runner)
    sample = parts.train[:64]
    each = tokens(runner.model, prompt, sample) / len(sample)
    steps = config.total_steps(len(parts.train))
    validations = 1 + -(-steps // config.validation_interval(len(parts.train)))
    trained = 2 * steps * config.batch_size * each + validations * tokens(runner.model, prompt, parts.validation)
    tested = tokens(runner.model, prompt, parts.test)
    total = sum(tested + (0 if way == BEFORE else trained) for _, way, _ in todo)
    return (
        f"about {total / 1e6:.2g} million tokens, of which each test takes {tested:,.0f} and each optimisation or "
        f"search {trained:,.0f}, backward passes included. An estimate of the time follows the first run."
    )


def _told(outcome: Outcome) -> str:
    return ", ".join(
        f"{MEASURES[measure]} {in_percent(Accuracy.of(outcome.correct[measure]))}"
        for measure in ("generated_accuracy", "choice_accuracy")
        if measure in outcome.correct
    )


def _random(runner: Runner) -> SoftPrompt:
    """A prompt of random tokens, as many as the configuration's prompt has."""
    model = runner.model
    count = len(starting(runner.plan.prompt)(runner).token_ids)
    draw = random.Random("nonsense")
    special = set(model.tokenizer.eos_ids)
    ids = [i for i in draw.sample(range(model.config.vocab_size), 4 * count) if i not in special]
    words = [i for i in ids if model.tokenizer.decode([i]).strip()][:count]
    return SoftPrompt.from_ids(model, words or ids[:count], runner.plan.template(model))


STUDY = Study("starting prompts from good to adversarial: in cones, without a region, and by discrete search", run)
