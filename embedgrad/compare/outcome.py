"""The outcome of an arm on the test items, for one seed and one fold, as it is stored on disk. It holds no texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from embedgrad.data.example import Example
from embedgrad.evaluation.evaluate import MEASURES, Evaluation
from embedgrad.util.errors import ConfigError
from embedgrad.util.files import write_atomic

FILE = "result.json"


@dataclass(frozen=True)
class Outcome:
    """The outcome of an arm for one seed and one fold.

    items: a hash of each test item. correct: {measure: for each item whether it is right}.
    answers: values of `embedgrad.evaluation.answers.AnswerStatistics`.
    forward_tokens, backward_tokens: tokens processed to make the prompt, in training and validation but not in the
        test. Every sequence counts in full, as if no prefix were shared.
    candidates: number of prompts that were tried. seconds: time to make the prompt.
    similarity: lowest cosine of a prompt row with its anchor; None where nothing was optimised.
    best_step, steps: step of the best prompt and number of steps. train_accuracy: training accuracy at the last
        validation. validation: accuracy and loss {before, after}. alarms: the alarms of the run.
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
        """Writes the outcome into the arm's folder, whole or not at all. Raises SaveError."""
        write_atomic(folder / FILE, (json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Outcome | None:
        """The outcome that `save` wrote; None where there is no file. Raises ConfigError for a damaged file."""
        path = folder / FILE
        try:
            values = json.loads(path.read_text("utf-8"))
            return cls(**{each.name: values[each.name] for each in fields(cls)})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); remove it, and its arm is tested again.") from error


def verdicts(evaluation: Evaluation) -> dict[str, list[bool]]:
    """{measure: for each item whether it is right}, for the measures of the evaluation."""
    return {name: evaluation.correct(name) for name in MEASURES if getattr(evaluation, name) is not None}


def item_hashes(examples: Sequence[Example]) -> list[str]:
    """A hash of each example, by which outcomes on the same items are recognised. It does not reveal the text."""
    return [hashlib.sha256(json.dumps([e.query, e.target], default=list).encode()).hexdigest()[:16] for e in examples]


@dataclass(frozen=True)
class Pooled:
    """The outcomes of one arm and seed over all folds."""

    arm: str
    title: str
    seed: int
    parts: list[Outcome]

    @property
    def items(self) -> list[str]:
        """The items' hashes of all folds, in the order of the folds."""
        return [item for part in self.parts for item in part.items]

    def correct(self, measure: str) -> list[bool]:
        """For each of `items` whether it is right by `measure`."""
        return [right for part in self.parts for right in part.correct[measure]]

    @property
    def measures(self) -> list[str]:
        """The measures that every fold has."""
        return [name for name in MEASURES if all(name in part.correct for part in self.parts)]


def pooled(outcomes: Sequence[Outcome]) -> dict[str, list[Pooled]]:
    """{arm: one `Pooled` per seed}, in the order in which the arms were run. Folds are in ascending order."""
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
