"""What one arm came to on the test items of one seed and one fold, as it is kept on disk: without any text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from embedgrad.errors import ConfigError
from embedgrad.evaluation import MEASURES, Evaluation
from embedgrad.example import Example
from embedgrad.files import write_atomic

FILE = "result.json"


@dataclass(frozen=True)
class Outcome:
    """items: a hash of each test item, in the order of `correct`, {measure: which items are right}. answers: of
    `embedgrad.answers.AnswerStatistics`. forward_tokens, backward_tokens: what making the prompt took (training and
    validation, not the test), every sequence counted whole, as if nothing were shared. candidates: prompts that were
    tried. similarity: lowest cosine of a token with its anchor; None where nothing was optimised. validation: accuracy
    and loss {before, after}; alarms: those that went off; best_step, steps: of the optimisation.
    """

    arm: str
    title: str
    seed: int
    fold: int
    items: list[str]
    correct: dict[str, list[bool]]
    answers: dict[str, Any]
    forward_tokens: int = 0
    backward_tokens: int = 0
    candidates: int = 1
    seconds: float = 0.0
    similarity: float | None = None
    best_step: int | None = None
    steps: int | None = None
    train_accuracy: float | None = None
    validation: dict[str, Any] | None = None
    alarms: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write it into an arm's folder, whole or not at all."""
        write_atomic(folder / FILE, (json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Outcome | None:
        """What `save` wrote; None where nothing is there. Raises ConfigError for a file that is damaged."""
        path = folder / FILE
        try:
            values = json.loads(path.read_text("utf-8"))
            return cls(**{each.name: values[each.name] for each in fields(cls)})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); remove it, and its arm is tested again.") from error


def verdicts(evaluation: Evaluation) -> dict[str, list[bool]]:
    """{measure: which items are right}, for the measures that were taken."""
    return {name: evaluation.correct(name) for name in MEASURES if getattr(evaluation, name) is not None}


def item_hashes(examples: Sequence[Example]) -> list[str]:
    """What says that two outcomes were tested on the same items; no text can be read off it."""
    return [hashlib.sha256(json.dumps([e.query, e.target], default=list).encode()).hexdigest()[:16] for e in examples]


@dataclass(frozen=True)
class Pooled:
    """The outcomes of one arm and seed over all folds, as one."""

    arm: str
    title: str
    seed: int
    parts: list[Outcome]

    @property
    def items(self) -> list[str]:
        """Of all folds, one after the other."""
        return [item for part in self.parts for item in part.items]

    def correct(self, measure: str) -> list[bool]:
        """Which of `items` are right."""
        return [right for part in self.parts for right in part.correct[measure]]

    @property
    def measures(self) -> list[str]:
        """Those that every fold has."""
        return [name for name in MEASURES if all(name in part.correct for part in self.parts)]


def pooled(outcomes: Sequence[Outcome]) -> dict[str, list[Pooled]]:
    """{arm: one entry per seed}, in the order in which they were run; folds in their order."""
    found: dict[str, dict[int, list[Outcome]]] = {}
    for one in outcomes:
        found.setdefault(one.arm, {}).setdefault(one.seed, []).append(one)
    return {
        arm: [
            Pooled(arm, parts[0].title, seed, sorted(parts, key=lambda part: part.fold))
            for seed, parts in by_seed.items()
        ]
        for arm, by_seed in found.items()
    }
