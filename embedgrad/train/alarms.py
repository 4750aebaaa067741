"""Alarms on a run's records, for the signs of failure that EmbedGrad (arXiv 2508.03533) names, with its thresholds.

- similarity, in each step's record: the lowest cosine of a prompt row with its anchor is below 0.90. The prompt drifts
  away from its text.
- gap, in each validation's record: training accuracy exceeds validation accuracy by more than 15 points. The prompt
  overfits. Both are measured on a few dozen examples, where 15 points may be chance, so the alarm also requires that
  the lower end of the difference's 95 % interval is above 0.
- collapse, in each validation's record: the answers' entropy is below 0.05. All queries get the same answer, or answers
  repeat themselves. `embedgrad.evaluation.answers.AnswerStatistics.collapse` defines the entropy.

An alarm goes off when its sign appears, and not again while the sign stays. Signs before the first step belong to the
starting prompt and raise no alarm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from embedgrad.train.settings import AlarmSection, MonitorSection


@dataclass(frozen=True)
class Alarm:
    """An alarm: its sign, the step after which it appeared, the value, the threshold, and the action that follows."""

    sign: str
    step: int
    value: float
    threshold: float
    action: str

    def to_record(self) -> dict[str, Any]:
        """The alarm as a record of metrics.jsonl, kind "alarm"."""
        return {"kind": "alarm", **vars(self)}

    def sentence(self) -> str:
        """The alarm as a sentence for people."""
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
    """Checks the records of a run in their order."""

    def __init__(self, settings: MonitorSection, records: Iterable[Mapping[str, Any]] = ()) -> None:
        """records: the records of earlier sessions, whose alarms have gone off before."""
        self._settings = settings
        self._shown: set[str] = set()  # signs that were present in the last record of their kind
        for record in records:
            self.check(record)

    def check(self, record: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that go off with this record."""
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
    """(sign, value) for each sign that the record contains."""
    if record["kind"] == "step":
        yield "similarity", record["similarity_min"]
    elif record["kind"] == "validation":
        if "gap" in record:
            certain = record["gap_low"] > 0
            yield "gap", record["gap"] if certain else min(record["gap"], 0.0)
        if "answers" in record:
            yield "collapse", record["answers"]["collapse"]
