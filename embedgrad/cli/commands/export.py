"""`embedgrad export`: writes tuned prompts for another program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedgrad.exports.export import ExportReport, export
from embedgrad.train.paths import expand_path


def run(prompts: Sequence[Path], to: str, model: str, out: Path, as_json: bool, **options: Any) -> None:
    """Runs the command. Raises EmbedGradError."""
    report = export(list(prompts), to=to, model=expand_path(model), out=out, **options)
    if as_json:
        print(json.dumps(described(report), ensure_ascii=False))
    else:
        _tell(report)


def described(report: ExportReport) -> dict[str, Any]:
    """The report as JSON-able values."""
    content: dict[str, Any] = {"target": report.target, "path": str(report.path), "prompts": report.prompts}
    content["facts"] = report.facts
    content["check"] = None if report.check is None else vars(report.check)
    return content | ({"unchecked": report.unchecked} if report.unchecked else {})


def _tell(report: ExportReport) -> None:
    print(f"{report.path}: {', '.join(report.prompts)}")
    for name, value in report.facts.items():
        print(f"  {name}: {f'{value:.2g}' if isinstance(value, float) else value}")
    checked = f"not checked: {report.unchecked}." if report.check is None else report.check.sentence()
    print(f"  check: {checked}" if report.check is not None else f"  {checked}")
