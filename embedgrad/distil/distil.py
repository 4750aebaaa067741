"""Distillation: from a soft prompt to the best text, on a budget of tokens, in pieces that are saved one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from embedgrad.compare.outcome import item_hashes, verdicts
from embedgrad.compare.runner import tokens
from embedgrad.data.example import Example
from embedgrad.distil.candidates import ABOUT, Candidates, induced, nearest, usable, words
from embedgrad.distil.judges import TextJudge
from embedgrad.distil.ledger import Ledger
from embedgrad.engine.model import Model
from embedgrad.evaluation.evaluate import Evaluation, default_sampling, evaluate
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.search.objective import text_nll
from embedgrad.search.plan import NAMES as SEARCHES
from embedgrad.search.plan import make_search
from embedgrad.tasks.parts import Parts
from embedgrad.train.checkpoints import tensor_hash
from embedgrad.train.plan import Plan
from embedgrad.util.errors import ConfigError, ContextError

SOFT, ORIGINAL = "\0soft", "the original text"  # names of what is measured beside the candidates
CHEAP = ("nearest", "words", "induced")
SOURCES = (*CHEAP, *SEARCHES)
SCORINGS = 400  # the default budget, in scorings of one text on the validation data
FROM_BEST = " from the best candidate"  # ends the names of searches that start there
FINALISTS = 3  # texts of a search that are scored
_CHEAP_SHARE = 2  # 1/_CHEAP_SHARE of the budget is for the candidates that need no search, and their scoring


@dataclass(frozen=True)
class Settings:
    """How a distillation goes.

    sources: some of SOURCES. samples: answers to each request for words, and induced instructions. budget: tokens
    (`search.objective` says what costs what); None: SCORINGS scorings. top: texts that are tested. longest: tokens of
    a candidate that the model writes. batch_size: examples in a step of a search. judged: texts that a judge is asked
    about, the best on the model itself. from_best: search from the best candidate as well.
    """

    sources: Sequence[str] = SOURCES
    samples: int = 8
    budget: int | None = None
    seed: int = 0
    top: int = 3
    longest: int = 96
    batch_size: int = 8
    judged: int = 20
    from_best: bool = True

    def __post_init__(self) -> None:
        """Raises ConfigError for a source that there is not."""
        unknown = [name for name in self.sources if name not in SOURCES]
        if unknown:
            raise ConfigError(f"there is no source {unknown[0]!r}; choose among {', '.join(SOURCES)}.")


class Distillation:
    """One distillation. `pieces` does the work; between two pieces everything is on the disk."""

    def __init__(
        self, plan: Plan, model: Model, prompt: SoftPrompt, parts: Parts, settings: Settings, folder: Path,
        judge: TextJudge | None = None,
    ) -> None:  # fmt: skip
        """Raises ConfigError (no training or validation data, a folder of another distillation)."""
        for part, what, field in (
            (parts.train, "training", "data.train"), (parts.validation, "validation", "data.validation"),
        ):  # fmt: skip
            if not part:
                raise ConfigError(
                    f"a distillation needs {what} data: give them in the configuration ({field}, or a split)."
                )
        self.plan, self.model, self.prompt, self.parts, self.settings = plan, model, prompt, parts, settings
        self.judge = judge
        self.template = prompt.template
        self.sampling = plan.sampling or default_sampling(model, parts.validation, plan.labels)
        folder.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(folder, self._identity())
        self.notes: list[str] = []

    def _identity(self) -> dict[str, Any]:
        parts, settings = self.parts, self.settings
        items = [item_hashes(part) for part in (parts.train, parts.validation, parts.test)]
        free = ("budget", "sources", "top", "judged", "from_best")
        return {
            "prompt": tensor_hash(self.prompt.embeddings, self.prompt.anchor),
            "template": self.template.to_json(),
            "model": self.model.weights_hash(),
            "data": hashlib.sha256(repr(items).encode()).hexdigest(),
            "grader": self.plan.grader.describe(),
            "sampling": asdict(self.sampling),
            "settings": {key: value for key, value in asdict(settings).items() if key not in free},
        }

    @cached_property
    def scoring_cost(self) -> int:
        """Tokens of scoring the original text on the validation data, its longest answers included."""
        return self._cost(SoftPrompt.from_text(self.model, self.prompt.text, self.template), self.parts.validation)

    @property
    def budget(self) -> int:
        """Tokens that may be spent on candidates, searches, and scoring on the validation data."""
        return SCORINGS * self.scoring_cost if self.settings.budget is None else self.settings.budget

    def _cost(self, prompt: SoftPrompt, examples: Sequence[Example]) -> int:
        return tokens(self.model, prompt, examples) + self._longest_answers(examples)

    def _longest_answers(self, examples: Sequence[Example]) -> int:
        return len(examples) * self.sampling.max_new_tokens

    def pieces(self) -> Iterator[str]:
        """Does the work piece by piece; yields after each what was done, when it is saved."""
        if 2 * self.scoring_cost > self.budget:
            raise ConfigError(
                f"the budget of {self.budget:,} tokens does not pay for scoring the soft prompt and its original text "
                f"on {len(self.parts.validation)} validation items; give at least {20 * self.scoring_cost:,}."
            )
        yield from self._score(SOFT, "the soft prompt")
        yield from self._score(self.prompt.text, ORIGINAL)
        for name in CHEAP:
            if name in self.settings.sources:
                yield from self._cheap(name)
        yield from self._searches()
        if self.judge is not None:
            yield from self._judged()
        yield from self._tested()

    def _searches(self) -> Iterator[str]:
        """The searches from the original text; then, for as many tokens, from the best text that there is by then."""
        searches = [name for name in self.settings.sources if name in SEARCHES]
        rounds = 2 if self.settings.from_best else 1
        share = (self.budget - self._spent_before_searches()) // max(1, rounds * len(searches))
        for name in searches:
            yield from self._search(name, name, self.prompt.text, share)
        if not self.settings.from_best or not searches:
            return
        best = next(text for text in self.ranked() if not self.ledger.scores[text]["source"].endswith(FROM_BEST))
        if best == self.prompt.text:
            self.notes.append("No candidate was better than the original text, so all searches started from it.")
            return
        for name in searches:
            yield from self._search(name, name + FROM_BEST, best, share)

    def ranked(self) -> list[str]:
        """The texts with a score, the best on the validation data first: by the answer as generated, then by the
        likeliest label, then the shorter one."""
        found = {text: one for text, one in self.ledger.scores.items() if text != SOFT and "correct" in one}
        return sorted(found, key=lambda text: _rank(found[text]), reverse=True)

    def best(self) -> list[str]:
        """`ranked`, by the judge's verdicts first where there is one. Texts that it was not asked about come last."""
        texts = self.ranked()
        if self.judge is None:
            return texts

        def judged(text: str) -> float:
            known = [right for right in self.judged.get(text, []) if right is not None]
            return sum(known) / len(known) if known else -1.0

        return sorted(texts, key=lambda text: -judged(text))  # stable: equal ones stay as they were ranked

    @property
    def judged(self) -> dict[str, list[bool | None]]:
        """{text: the judge's verdicts}; empty without a judge."""
        return {} if self.judge is None else self.ledger.judged.setdefault(self.judge.name, {})

    def _spent_before_searches(self) -> int:
        scored = [one["spent"] for one in self.ledger.scores.values() if not one["source"].startswith(SEARCHES)]
        return sum(scored) + self.ledger.spent["candidates"]

    def _scored(self, source: str) -> int:
        """Tokens spent on scoring the texts of a source."""
        return sum(one["spent"] for one in self.ledger.scores.values() if one["source"] == source)

    def _score(self, text: str, source: str, limit: int | None = None) -> Iterator[str]:
        """Measures a text on the validation data, unless that is done or would cost more than `limit` tokens."""
        if text in self.ledger.scores:
            return
        soft = text == SOFT
        if not soft and not usable(self.model, text, self.template):
            self.ledger.scores[text] = {"source": source, "spent": 0}
            return
        prompt = self.prompt if soft else SoftPrompt.from_text(self.model, text, self.template)
        try:
            shown = tokens(self.model, prompt, self.parts.validation)
            if limit is not None and shown + self._longest_answers(self.parts.validation) > limit:
                return
            found = self._evaluate(prompt, self.parts.validation)
        except ContextError:  # a text so long that some query has no room behind it
            self.ledger.scores[text] = {"source": source, "spent": 0}
            return
        nll = None if soft else text_nll(self.model, text)
        answers = sum(record.tokens for record in found.records)
        self.ledger.scores[text] = {
            "source": source, "spent": shown + answers,
            "correct": verdicts(found), "tokens": len(prompt.token_ids), "nll": nll,
        }  # fmt: skip
        self.ledger.save()
        yield f"{source}: {found.generated_accuracy.value:.1%} of the validation answers right"

    def _evaluate(self, prompt: SoftPrompt, examples: Sequence[Example]) -> Evaluation:
        return evaluate(self.model, prompt, examples, self.plan.labels, self.sampling, self.plan.grader)

    def _cheap(self, source: str) -> Iterator[str]:
        limit = self.budget // _CHEAP_SHARE
        jobs: dict[str, Callable[[], Candidates]] = {}
        settings, model = self.settings, self.model
        if source == "nearest":
            jobs["nearest"] = lambda: nearest(model, self.prompt)
        elif source == "induced":
            jobs["induced"] = lambda: induced(
                model, self.template, self.parts.train, settings.samples, settings.seed, settings.longest
            )
        else:
            for name in (*ABOUT, "in place"):
                jobs[f"words: {name}"] = lambda name=name: words(  # type: ignore[misc]
                    model, self.prompt, name, settings.samples, settings.seed, settings.longest
                )
        for name, make in jobs.items():
            if name not in self.ledger.sources:
                try:
                    made = make()
                except ContextError:
                    made = Candidates([])
                self.ledger.sources[name] = {"texts": made.texts, "spent": made.spent}
                self.ledger.save()
                yield f"{name}: {len(made.texts)} texts"
            if not self.ledger.sources[name]["texts"]:
                self.notes.append(f"The source {name} gave no text, as where its request has no room in the context.")
            for where, text in self.ledger.sources[name]["texts"]:
                yield from self._score(text, where, limit - sum(self.ledger.spent.values()))

    def _search(self, kind: str, name: str, text: str, share: int) -> Iterator[str]:
        start = SoftPrompt.from_text(self.model, text, self.template)
        size, seed = self.settings.batch_size, self.settings.seed
        search = make_search(kind, self.model, start, self.parts.train, batch_size=size, seed=seed)
        state = self.ledger.searches.get(name)
        if state is None:
            state = self.ledger.searches[name] = search.begin()
        reserved = FINALISTS * self._cost(start, self.parts.validation)
        while search.advance(state, share - reserved):
            self.ledger.save()
            yield f"{name}: step {state.step}"
        for found in search.texts(state, FINALISTS):
            yield from self._score(found, name, share - state.spent - self._scored(name))

    def _judged(self) -> Iterator[str]:
        assert self.judge is not None
        asked = [self.prompt.text, *(text for text in self.ranked() if text != self.prompt.text)]
        for text in asked[: self.settings.judged + 1]:
            known = self.judged.get(text)
            if known is None or None in known:
                items = self.parts.validation
                again = list(range(len(items))) if known is None else [i for i, one in enumerate(known) if one is None]
                found = self.judge.ask(text, [items[i] for i in again])
                merged: list[bool | None] = [None] * len(items) if known is None else list(known)
                for i, verdict in zip(again, found, strict=True):
                    merged[i] = verdict
                self.judged[text] = merged
                self.ledger.save()
                right = sum(one is True for one in merged)
                yield f"judge: {right} of {len(merged)} right"

    def _tested(self) -> Iterator[str]:
        """Tests the soft prompt, the original and the best texts on the test data, where there are any."""
        if not self.parts.test:
            return
        for text in (SOFT, self.prompt.text, *self.best()[: self.settings.top]):
            if text in self.ledger.tests:
                continue
            prompt = self.prompt if text == SOFT else SoftPrompt.from_text(self.model, text, self.template)
            try:
                self.ledger.tests[text] = verdicts(self._evaluate(prompt, self.parts.test))
            except ContextError:
                self.notes.append("A text is too long for some test item and was not tested.")
                continue
            self.ledger.save()
            yield f"tested {len(self.ledger.tests)} prompts on {len(self.parts.test)} items"


def _rank(score: dict[str, Any]) -> tuple[float, float, int]:
    correct = score["correct"]
    shares = [sum(correct[name]) / len(correct[name]) for name in ("generated_accuracy", "choice_accuracy")
              if name in correct]  # fmt: skip
    return shares[0], shares[-1], -score["tokens"]
