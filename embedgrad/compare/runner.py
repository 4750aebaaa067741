"""Runs the arms of a comparison. Each seed and fold has its own folder; stored outcomes are not computed again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from embedgrad.compare.arm import Arm
from embedgrad.compare.arms import OPTIMISED
from embedgrad.compare.outcome import FILE as OUTCOME
from embedgrad.compare.outcome import Outcome, item_hashes, verdicts
from embedgrad.compare.peft_tuning import tune
from embedgrad.data.example import Example
from embedgrad.distributed.ranks import ALONE, Ranks
from embedgrad.engine.model import Model
from embedgrad.evaluation.evaluate import Evaluation, evaluate
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import render
from embedgrad.prompt.template import Template
from embedgrad.search.plan import make_search
from embedgrad.search.state_file import states_in, write_states
from embedgrad.tasks.parts import Parts
from embedgrad.train.agreement import SharedStop
from embedgrad.train.checkpoints import tensor_hash
from embedgrad.train.checks import check_parts
from embedgrad.train.optimize import OptimizeResult, optimize
from embedgrad.train.plan import Plan
from embedgrad.train.progress import Quiet
from embedgrad.train.run_folder import read_metrics
from embedgrad.train.settings import OptimizeConfig
from embedgrad.util.errors import ConfigError, EmbedGradError
from embedgrad.util.files import write_atomic
from embedgrad.util.interrupts import REASONS, Stopped, stop_on_signals

IDENTITY = "identity.json"
Layout = tuple[Template, str, tuple[int, ...]]
_PARTS = ("train", "validation", "test")
SEARCH = "search.safetensors"
_FINALISTS = 3  # texts of a search that are tried on the validation data, besides the start
_SEARCH_BATCH = 8  # examples in a step of a search, which scores many prompts on them
_LONGEST = 4  # examples that are rendered with each further candidate of an arm


class _Notes(Quiet):
    """Says what a resumed arm does not keep, and nothing else."""

    def note(self, text: str) -> None:
        """Gives a warning with the text."""
        warnings.warn(text, stacklevel=2)


class Runner:
    """A comparison in `folder`. Raises ConfigError where the folder belongs to other settings or another model."""

    def __init__(
        self,
        plan: Plan,
        model: Model,
        folder: Path,
        ranks: Ranks = ALONE,
        parts: Mapping[int, Parts] | None = None,
    ) -> None:
        """ranks: processes that share each arm's steps and items; the first reads and writes the folder.

        parts: the data of each fold, where they are not those that the plan gives for this model's tokenizer.
        """
        self.model, self.folder, self.ranks = model, folder, ranks
        self._parts = dict(parts or {})
        self._evaluated: dict[Hashable, Evaluation] = {}
        known = self._from_first(lambda: _read_identity(folder / IDENTITY))
        self.plan = replace(plan, date=None if known is None else known.get("date"))  # the day on which it began
        own = self._identity()
        ranks.only_first(lambda: self._begin(known, own))

    def _begin(self, known: dict[str, Any] | None, own: dict[str, Any]) -> None:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        if known is not None and _without_places(known) != own:
            raise ConfigError(
                f"{folder} holds arms of other settings, data or another model; give another run.name, or remove it."
            )
        write_atomic(folder / IDENTITY, (json.dumps(own, indent=1, sort_keys=True) + "\n").encode())

    def _from_first(self, read: Callable[[], Any]) -> Any:
        """What `read` returns (what JSON can say) on rank 0."""
        if self.ranks.size == 1:
            return read()
        found = self.ranks.only_first(read)
        told = self.ranks.share(json.dumps(found).encode())
        assert told is not None
        return json.loads(told)

    def _identity(self) -> dict[str, Any]:
        """Everything that all arms depend on, except the data: each outcome holds the hashes of its items."""
        config = self.plan.config.model_dump(mode="json", exclude={"run"})
        for free in ("arms", "seeds", "taus"):
            config["compare"].pop(free)
        for free in ("memory_policy", "memory_budget", "checkpoint_every"):
            config["optimize"].pop(free)
        config["data"].pop("fold")
        values = {"config": config, "prompt": self.plan.prompt, "weights": self.model.weights_hash()}
        if self.plan.saved is not None:
            values["start"] = tensor_hash(self.plan.saved.embeddings)
        if (date := self.plan.template(self.model).date) is not None:
            values["date"] = date
        return dict(_without_places(values))

    @cached_property
    def folds(self) -> range:
        """The folds that are pooled; without cross-validation there is one."""
        return range(self.plan.config.data.folds or 1)

    def parts(self, fold: int) -> Parts:
        """The data of one fold. Raises ConfigError where there are no test data."""
        if fold not in self._parts:
            self._parts[fold] = self.plan.parts(self.model.tokenizer, fold)
            if not self._parts[fold].test:
                raise ConfigError("a comparison needs test data: give data.test, or a split with a test part.")
        return self._parts[fold]

    def seeds(self, arm: Arm) -> Sequence[int]:
        """The configuration's seeds for a repeated arm, else only the first."""
        seeds = self.plan.config.compare.seeds
        return seeds if arm.repeated else seeds[:1]

    def place(self, arm: str, seed: int, fold: int) -> Path:
        """The folder of an arm for one seed and fold."""
        inner = f"seed-{seed}" + (f"-fold-{fold}" if self.plan.config.data.folds else "")
        return self.folder / arm / inner

    def done(self, arm: str, seed: int, fold: int) -> bool:
        """Whether the outcome of an arm is stored."""
        return bool(self._from_first(lambda: (self.place(arm, seed, fold) / OUTCOME).exists()))

    def check(self, arms: Sequence[Arm]) -> None:
        """Raises the errors of all arms before the first is run: data, prompts, templates, lengths.

        Every example is rendered with an arm's first prompt, the longest few with its other candidates.
        """
        for fold in self.folds:
            parts, start = self.parts(fold), self.plan.start(self.model)
            check_parts(self.plan, self.model, start, parts)
            seen = {(_layout(start), name) for name in ("train", "validation")}  # whose targets were rendered, too
            for arm in arms:
                try:
                    for seed in self.seeds(arm):
                        if Outcome.load(self.place(arm.name, seed, fold)) is None:
                            self._check(arm, parts, seed, seen)
                except EmbedGradError as error:
                    raise type(error)(f"the arm {arm.name} cannot be run: {error}") from error

    def _check(self, arm: Arm, parts: Parts, seed: int, seen: set[tuple[Layout, str]]) -> None:
        """seen: what was rendered whole before, as another arm or seed; it is not rendered again."""
        for number, prompt in enumerate(arm.candidates(self.model, parts.train, seed)):
            for name in _PARTS if arm.training is not None or arm.search is not None else _PARTS[1:]:
                part, key = getattr(parts, name), (_layout(prompt), name)
                if key in seen:
                    continue
                for example in part if number == 0 else sorted(part, key=lambda e: -len(e.query))[:_LONGEST]:
                    render(self.model, prompt, example, example.where)
                if number == 0:
                    seen.add(key)

    def run(self, arm: Arm, seed: int, fold: int, budget: int | None = None) -> Outcome:
        """The arm's outcome, read from its folder or made by running the arm.

        budget: number of tokens that an arm with several candidates may process on the validation data (None: no
            limit), or a search in all, its validations included.
        Raises Stopped after a signal, and ConfigError where the stored outcome belongs to other test items.
        """
        place = self.place(arm.name, seed, fold)
        parts = self.parts(fold)
        items = item_hashes(parts.test)
        stored = self._from_first(lambda: None if (o := Outcome.load(place)) is None else asdict(o))
        if stored is not None:
            known = Outcome(**stored)
            if known.items != items:
                raise ConfigError(f"{place} was tested on other items; give another run.name, or remove it.")
            return known
        if self.ranks.leads:
            place.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        candidates = arm.candidates(self.model, parts.train, seed)
        if arm.search is not None:
            prompt, figures = self._searched(arm.search, candidates[0], parts, seed, place, budget or 0)
        elif arm.training is None:
            prompt, figures = self._best(candidates, parts.validation, budget)
        else:
            prompt, figures = self._optimised(arm, candidates[0], parts, seed, place)
        spent = time.monotonic() - started
        evaluation = self.evaluate(prompt, parts.test)
        outcome = Outcome(
            arm=arm.name, title=arm.title, seed=seed, fold=fold, items=items, correct=verdicts(evaluation),
            answers=evaluation.statistics.to_dict(), seconds=spent, **figures,
        )  # fmt: skip
        if self.ranks.leads:
            outcome.save(place)
        return outcome

    def records(self, arm: str, seed: int, fold: int) -> list[dict[str, Any]]:
        """The records in metrics.jsonl of an optimised arm."""
        records: list[dict[str, Any]] = self._from_first(lambda: read_metrics(self.place(arm, seed, fold))[0])
        return records

    def evaluate(self, prompt: SoftPrompt, examples: Sequence[Example]) -> Evaluation:
        """Evaluates a prompt with the configuration's labels, sampling and grader.

        Each prompt is evaluated once on the same items: searches with other seeds start from the same text, and often
        end there.
        """
        plan = self.plan
        key = (tensor_hash(prompt.embeddings), _layout(prompt), tuple(item_hashes(examples)))
        if key not in self._evaluated:
            self._evaluated[key] = evaluate(
                self.model, prompt, examples, plan.labels, plan.sampling, plan.grader, self.ranks
            )
        return self._evaluated[key]

    def budget(self, outcomes: Sequence[Outcome], fold: int) -> int | None:
        """Forward plus backward tokens of the optimised prompt on this fold, for its first seed; None before it ran."""
        spent = [o.forward_tokens + o.backward_tokens for o in outcomes if o.arm == OPTIMISED and o.fold == fold]
        return spent[0] if spent else None

    def _best(
        self, candidates: Sequence[SoftPrompt], validation: Sequence[Example], budget: int | None
    ) -> tuple[SoftPrompt, dict[str, Any]]:
        """(best candidate on the validation data, fields of `Outcome`).

        Candidates are ranked by generated accuracy, then by the accuracy of the likeliest label.
        """
        if len(candidates) == 1 or not validation:
            return candidates[0], {}
        spent, tried = 0, 0
        best, best_rank = candidates[0], (-1.0, -1.0)
        for prompt in candidates:
            cost = tokens(self.model, prompt, validation)
            if tried and budget is not None and spent + cost > budget:
                break
            found = self.evaluate(prompt, validation)
            choice = found.choice_accuracy
            rank = (found.generated_accuracy.value, choice.value if choice is not None else 0.0)
            spent, tried = spent + cost, tried + 1
            if rank > best_rank:
                best, best_rank = prompt, rank
        return best, {"forward_tokens": spent, "candidates": tried, "validation": {"after": {"accuracy": best_rank[0]}}}

    def _searched(
        self, name: str, prompt: SoftPrompt, parts: Parts, seed: int, place: Path, budget: int
    ) -> tuple[SoftPrompt, dict[str, Any]]:
        """(best of the start and the search's texts on the validation data, fields of `Outcome`)."""
        path = place / SEARCH
        size = min(_SEARCH_BATCH, self.plan.config.optimize.batch_size)
        search = make_search(name, self.model, prompt, parts.train, batch_size=size, seed=seed, ranks=self.ranks)
        saved = self.ranks.share(self.ranks.only_first(lambda: path.read_bytes() if path.exists() else None))
        state = search.begin() if saved is None else states_in(saved, path)[0][name]
        watched, texts = self._reserved(tokens(self.model, prompt, parts.validation), budget)
        with stop_on_signals(terminate=True, once=self.ranks.size == 1) as asked:
            stop = SharedStop(asked, self.ranks)
            while search.advance(state, budget - watched):
                self.ranks.only_first(lambda: write_states(path, {name: state}, {}))
                if stop.agree() and stop.reason is not None:
                    raise Stopped(stop.reason)
        found = [prompt]
        for text in search.texts(state, texts):
            with contextlib.suppress(EmbedGradError):  # a text that is no prompt, such as one with a control token
                found.append(SoftPrompt.from_text(self.model, text, prompt.template))
        best, figures = self._best(found, parts.validation, budget - state.spent)
        spent = figures.get("forward_tokens", 0) + state.spent - state.backward
        return best, {**figures, "forward_tokens": spent, "backward_tokens": state.backward, "steps": state.step}

    def _reserved(self, cost: int, budget: int) -> tuple[int, int]:
        """(tokens that a search leaves for validations, texts besides the start that are validated): up to _FINALISTS
        texts in a third of the budget, but at least one."""
        texts = max(1, min(_FINALISTS, budget // 3 // max(1, cost) - 1))
        return (texts + 1) * cost, texts

    def _optimised(
        self, arm: Arm, prompt: SoftPrompt, parts: Parts, seed: int, place: Path
    ) -> tuple[SoftPrompt, dict[str, Any]]:
        training = arm.training
        assert training is not None
        config = self._config(arm, seed)
        train, validation = parts.train, parts.validation
        if training.shuffled:
            train, validation = (shuffled(part, seed) for part in (train, validation))
        if training.peft:
            return tune(self.model, prompt, train, validation, config)
        description = {"arm": arm.name, "optimize": config.model_dump(mode="json")}
        result = optimize(
            self.model, prompt, train, validation, config,
            run_dir=place, resume="auto", description=description, terminate_cleanly=True, judge=self.plan.judge,
            progress=_Notes(), allow_other_bits=True, ranks=self.ranks,
        )  # fmt: skip
        if result.stop_reason in REASONS:
            raise Stopped(result.stop_reason)
        return result.prompt, self._figures(result, validation)

    def _config(self, arm: Arm, seed: int) -> OptimizeConfig:
        """The configuration's settings for an arm. Alarms only warn, so that every arm has the same number of steps."""
        config = self.plan.config.optimize
        quiet = {
            sign: getattr(config.monitors, sign).model_copy(update={"action": "warn"})
            for sign in ("similarity", "gap", "collapse")
        }
        changes: dict[str, Any] = {"seed": seed, "monitors": config.monitors.model_copy(update=quiet)}
        if arm.training is not None and arm.training.region is not None:
            changes["trust_region"] = arm.training.region
        if arm.training is not None and arm.training.learning_rate is not None:
            changes["learning_rate"] = arm.training.learning_rate
        return config.model_copy(update=changes)

    def _figures(self, result: OptimizeResult, validation: Sequence[Example]) -> dict[str, Any]:
        trained = sum(record["tokens"] for record in result.history)
        watched = len(result.validations) * tokens(self.model, result.prompt, validation)
        trains = [r["train_accuracy"] for r in result.validations if "train_accuracy" in r]
        return {
            "forward_tokens": trained + watched,
            "backward_tokens": trained,
            "similarity": result.min_similarity,
            "best_step": result.best_step,
            "steps": result.steps,
            "train_accuracy": trains[-1] if trains else None,
            "validation": {"before": result.before, "after": result.after},
            "alarms": [{key: a[key] for key in ("sign", "step", "value")} for a in result.alarms],
        }


def _layout(prompt: SoftPrompt) -> Layout:
    """What decides about the tokens that a prompt makes of an example."""
    return prompt.template, prompt.text, tuple(prompt.token_ids)


def _read_identity(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}.") from error
    return found if isinstance(found, dict) else {}


def _without_places(values: Any) -> Any:
    """An identity without the paths of model, prompt and data: weights, texts and items are what counts."""
    if not isinstance(values, dict):
        return values
    places = ("path", "file", "folder")
    return {key: _without_places(value) for key, value in values.items() if key not in places}


def tokens(model: Model, prompt: SoftPrompt, examples: Sequence[Example]) -> int:
    """Number of tokens in the examples' whole sequences, as if no prefix were shared."""
    return sum(len(render(model, prompt, example).ids) for example in examples)


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """The examples with their targets permuted by `seed`, so that only the targets' format can be learnt."""
    targets = [example.target for example in examples]
    key = hashlib.sha256(f"{seed}/shuffled/{len(targets)}".encode()).hexdigest()
    random.Random(key).shuffle(targets)
    return [replace(example, target=target) for example, target in zip(examples, targets, strict=True)]
