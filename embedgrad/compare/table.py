"""The table of a comparison: each arm's accuracies with intervals, and a paired test against the original text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from embedgrad.compare.arms import ORIGINAL
from embedgrad.compare.outcome import Outcome, Pooled, pooled
from embedgrad.evaluation.evaluate import MEASURES
from embedgrad.evaluation.statistics import McNemar, Spread, wilson
from embedgrad.util.errors import DataError

NOTE = (
    "Accuracies on {items} test items{folds}: mean of the seeds ± their standard deviation, and the 95 % Wilson "
    "interval of the mean at that number of items. Against the original text on the same items: gained and lost by the "
    "first seed, and McNemar's exact p, the largest of the seeds'. Invalid: answers without an allowed label. "
    "Similarity: the lowest of any prompt token in any run. Tokens: what making the prompt took, forward + backward, "
    "every sequence counted whole; arms that only choose among prompts may spend as many as the optimised one."
)


@dataclass(frozen=True)
class Cell:
    """One measure of one arm.

    spread, low, high: over the seeds, with the 95 % Wilson interval of the mean. gained, lost: items against the
    original text, for the first seed. p: the largest p-value of McNemar's test over the seeds. The last three are None
    for the original text itself and where it was not run.
    """

    spread: Spread
    low: float
    high: float
    gained: int | None
    lost: int | None
    p: float | None

    def told(self) -> str:
        """The accuracy as text, such as "68.2 % ± 1.1 [64.0, 72.1]"."""
        deviation = "" if self.spread.deviation is None else f" ± {100 * self.spread.deviation:.1f}"
        return f"{100 * self.spread.mean:.1f} %{deviation} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def against(self) -> str:
        """The test as text, such as "+40 −12, p = 0.00011"; empty without a test."""
        return "" if self.p is None else f"+{self.gained} −{self.lost}, p = {self.p:.2g}"


@dataclass(frozen=True)
class Line:
    """The table's line for one arm.

    cells: by measure. invalid, tokens: means over all answers (`AnswerStatistics`). similarity: the lowest of all runs.
    forward_tokens, backward_tokens, seconds: means over the seeds. candidates: mean over all runs. gap: mean of
    training accuracy minus generated accuracy on the test items; None without training. alarms: number of runs by
    alarm.
    """

    arm: str
    title: str
    seeds: int
    cells: dict[str, Cell]
    invalid: float | None
    tokens: float
    similarity: float | None
    forward_tokens: float
    backward_tokens: float
    seconds: float
    candidates: float
    gap: float | None
    alarms: dict[str, int]


def lines(outcomes: Sequence[Outcome]) -> list[Line]:
    """One line per arm, in the order in which the arms were run.

    Raises DataError where an arm and the original text were not tested on the same items.
    """
    by_arm = pooled(outcomes)
    original = by_arm.get(ORIGINAL)
    return [_line(runs, None if arm == ORIGINAL or not original else original[0]) for arm, runs in by_arm.items()]


def _line(runs: Sequence[Pooled], original: Pooled | None) -> Line:
    parts = [part for run in runs for part in run.parts]
    similarities = [part.similarity for part in parts if part.similarity is not None]
    signs: dict[str, int] = {}
    for part in parts:
        for sign in {alarm["sign"] for alarm in part.alarms}:
            signs[sign] = signs.get(sign, 0) + 1
    invalid = [part.answers["invalid"] for part in parts]
    return Line(
        arm=runs[0].arm,
        title=runs[0].title,
        seeds=len(runs),
        cells={measure: _cell(runs, original, measure) for measure in runs[0].measures},
        invalid=None if None in invalid else _weighted(parts, "invalid"),
        tokens=_weighted(parts, "tokens"),
        similarity=min(similarities) if similarities else None,
        forward_tokens=sum(part.forward_tokens for part in parts) / len(runs),
        backward_tokens=sum(part.backward_tokens for part in parts) / len(runs),
        seconds=sum(part.seconds for part in parts) / len(runs),
        candidates=sum(part.candidates for part in parts) / len(parts),
        gap=_gap(parts),
        alarms=signs,
    )


def _weighted(parts: Sequence[Outcome], name: str) -> float:
    """The mean of a statistic of the answers, weighted by the number of answers in each part."""
    return sum(p.answers[name] * len(p.items) for p in parts) / sum(len(p.items) for p in parts)


def _gap(parts: Sequence[Outcome]) -> float | None:
    """Mean of training accuracy minus generated accuracy on the test items, as shares; None without training."""
    gaps = [
        part.train_accuracy - sum(part.correct["generated_accuracy"]) / len(part.items)
        for part in parts
        if part.train_accuracy is not None
    ]
    return sum(gaps) / len(gaps) if gaps else None


def _cell(runs: Sequence[Pooled], original: Pooled | None, measure: str) -> Cell:
    shares = [sum(run.correct(measure)) / len(run.items) for run in runs]
    spread = Spread.of(shares)
    low, high = wilson(spread.mean, len(runs[0].items))
    tests = []
    if original is not None and measure in original.measures:
        for run in runs:
            if run.items != original.items:
                raise DataError(f"the arm {run.arm} and the original text were not tested on the same items.")
            tests.append(McNemar.of(original.correct(measure), run.correct(measure)))
    if not tests:
        return Cell(spread, low, high, None, None, None)
    return Cell(spread, low, high, tests[0].gained, tests[0].lost, max(test.p for test in tests))


def to_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The lines and the outcomes as JSON-able values."""
    return {"lines": [asdict(line) for line in lines(outcomes)], "outcomes": [asdict(one) for one in outcomes]}


def columns(found: Sequence[Line], measures: Sequence[str] = tuple(MEASURES)) -> list[tuple[str, list[str]]]:
    """(heading, one text per arm) for each column that is not empty. measures: the accuracies to show."""
    measures = [name for name in measures if any(name in line.cells for line in found)]
    table: list[tuple[str, list[str]]] = [("", [line.title for line in found])]
    table.append(("seeds", [str(line.seeds) for line in found]))
    for name in measures:
        cells = [line.cells.get(name) for line in found]
        table.append((MEASURES[name], ["" if cell is None else cell.told() for cell in cells]))
        if name in ("generated_accuracy", "choice_accuracy"):
            table.append(("against the original", ["" if cell is None else cell.against() for cell in cells]))
    table.append(("invalid", ["" if line.invalid is None else f"{line.invalid:.1%}" for line in found]))
    table.append(("similarity", ["" if line.similarity is None else f"{line.similarity:.4f}" for line in found]))
    table.append(("tokens, thousands", [_cost(line) for line in found]))
    return [column for column in table if any(column[1])]


def _cost(line: Line) -> str:
    if not line.forward_tokens:
        return ""
    told = f"{line.forward_tokens / 1e3:.0f}"
    told += f" + {line.backward_tokens / 1e3:.0f}" if line.backward_tokens else ""
    return told + (f" ({line.candidates:.3g} tried)" if line.candidates > 1 else "")


def markdown(outcomes: Sequence[Outcome], notes: Sequence[str] = ()) -> str:
    """The table, its explanation and `notes` as Markdown."""
    found = lines(outcomes)
    table = columns(found)
    rows = [[heading for heading, _ in table], ["---"] * len(table), *zip(*(cells for _, cells in table), strict=True)]
    text = "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n\n".join([text, explanation(outcomes), *notes]) + "\n"


def explanation(outcomes: Sequence[Outcome]) -> str:
    """The explanation of the columns, and the alarms."""
    first = next(iter(pooled(outcomes).values()))[0]
    folds = (
        f" of {len(first.parts)} folds, each tested by a prompt that has not seen it" if len(first.parts) > 1 else ""
    )
    told = NOTE.format(items=len(first.items), folds=folds)
    alarms: Mapping[str, dict[str, int]] = {line.title: line.alarms for line in lines(outcomes) if line.alarms}
    if not alarms:
        return told
    seen = "; ".join(f"{title}: {', '.join(f'{s} {n}×' for s, n in signs.items())}" for title, signs in alarms.items())
    return f"{told} Alarms that went off (runs): {seen}."
