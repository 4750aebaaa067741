"""The failure signs that EmbedGrad (arXiv 2508.03533) names, with its thresholds, as alarms on a run's records.

- similarity: the lowest cosine of a prompt token with its anchor falls below 0.90: the prompt drifts away from what it
  said. In each step's record.
- gap: training accuracy exceeds validation accuracy by more than 15 points: overfitting. In each validation's record.
  Both are measured on a few dozen examples, where 15 points may be chance; the alarm therefore also wants the lower end
  of the difference's 95 % interval above 0.
- collapse: the answers' entropy falls below 0.05: everybody gets the same answer, or answers go round in circles
  (`embedgrad.answers.AnswerStatistics.collapse` says which entropy that is, and when). In each validation's record.

An alarm goes off where its sign appears, not again while it stays. Signs before the first step are the starting
prompt's and raise none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from embedgrad.settings import AlarmSection, MonitorSection


@dataclass(frozen=True)
class Alarm:
    """One alarm: which sign, seen after which step, the value and the threshold, and what is to be done."""

    sign: str
    step: int
    value: float
    threshold: float
    action: str

    def to_record(self) -> dict[str, Any]:
        """A line of metrics.jsonl, kind "alarm"."""
        return {"kind": "alarm", **vars(self)}

    def sentence(self) -> str:
        """For people."""
        told = {
            "similarity": f"a prompt token's similarity to its anchor is {self.value:.4f}, below {self.threshold:g}: "
            "the prompt drifts; a trust region or a lower learning rate holds it",
            "gap": f"training accuracy is {100 * self.value:.1f} points above validation accuracy, more than "
            f"{100 * self.threshold:g}: the prompt overfits; more data, fewer steps or a tighter region help",
            "collapse": f"the answers' entropy is {self.value:.3f}, below {self.threshold:g}: they all say "
            "the same, or repeat themselves",
        }
        return f"alarm after step {self.step}: {told[self.sign]}."


class Alarms:
    """Watches the records of one run in their order."""

    def __init__(self, settings: MonitorSection, records: Iterable[Mapping[str, Any]] = ()) -> None:
        """`records`: those of earlier sessions, whose alarms went off then."""
        self._settings = settings
        self._shown: set[str] = set()  # signs that the last record of their kind showed
        for record in records:
            self.check(record)

    def check(self, record: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that go off at this record."""
        return [alarm for sign, value in _values(record) if (alarm := self._check(sign, value, record["step"]))]

    def _check(self, sign: str, value: float, step: int) -> Alarm | None:
        setting: AlarmSection = getattr(self._settings, sign)
        appears = value > setting.threshold if sign == "gap" else value < setting.threshold
        if not appears or step == 0 or setting.action == "ignore":
            self._shown.discard(sign)
            return None
        if sign in self._shown:
            return None
        self._shown.add(sign)
        return Alarm(sign, step, value, setting.threshold, setting.action)


def _values(record: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """The signs that a record says something about."""
    if record["kind"] == "step":
        yield "similarity", record["similarity_min"]
    elif record["kind"] == "validation":
        if "gap" in record:
            certain = record["gap_low"] > 0
            yield "gap", record["gap"] if certain else min(record["gap"], 0.0)
        if "answers" in record:
            yield "collapse", record["answers"]["collapse"]
