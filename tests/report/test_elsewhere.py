"""The report of a run whose prompt was distilled and transferred."""

from __future__ import annotations

import json
from pathlib import Path

from embedgrad.cli.commands.distil import Options as DistilOptions
from embedgrad.cli.commands.distil import run as distil
from embedgrad.cli.commands.report import run as report
from embedgrad.cli.commands.transfer import Options as TransferOptions
from embedgrad.cli.commands.transfer import run as transfer
from embedgrad.distil.distil import Settings
from embedgrad.report.elsewhere import elsewhere
from tests.train.training import model_folder


def test_a_report_shows_texts_and_other_models(copied: Path) -> None:
    assert elsewhere(copied) == ({}, [])
    prompt = copied / "prompt.safetensors"
    assert distil(prompt, DistilOptions(quiet=True), Settings(("nearest",), budget=30_000)) == 0
    options = TransferOptions(quiet=True, steps=2, translators=("ridge",), overrides=["compare.seeds=[0]"])
    assert transfer(prompt, str(model_folder()), options) == 0
    report([copied], None, 0)
    best = (copied / "distil/best.txt").read_text().strip()
    for page in ("report.html", "report.md"):
        text = (copied / page).read_text()
        assert "The prompt as text" in text
        assert "The prompt on tiny" in text
        assert best[:10].strip() in text
        assert "transferred, ridge" in text


def test_damaged_files_are_left_out_and_said(copied: Path) -> None:
    for name, content in (("distil/distil.json", "{"), ("transfer-x/transfer.json", json.dumps({"arms": 3}))):
        (copied / name).parent.mkdir()
        (copied / name).write_text(content)
    tables, missing = elsewhere(copied)
    assert tables == {}
    assert missing == [
        "distil/distil.json is damaged and was left out.",
        "transfer-x/transfer.json is damaged and was left out.",
    ]
    report([copied], None, 0)
