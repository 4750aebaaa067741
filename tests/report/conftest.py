"""A short run of the tests' tiny model by `embedgrad optimize`, on made-up data, which sets off an alarm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from embedgrad.cli.app import app
from tests.train.training import model_folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Tests must not change it."""
    place = tmp_path_factory.mktemp("report")
    words = ["joy", "pain", "wit", "noise"]
    lines = [{"text": f"A film of {words[i % 4]}, number {i}", "label": ["good", "bad"][i % 2]} for i in range(24)]
    (place / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "model": {"path": str(model_folder()), "device": "cpu"},
        "prompt": "Say what it is.",
        "data": {
            "path": str(place / "data.jsonl"), "query": "text", "target": "label", "labels": ["good", "bad"],
            "split": {"train": 12, "validation": 4, "test": 8},
        },
        "optimize": {"steps": 6, "batch_size": 4, "validate_every": 3, "learning_rate": 0.1, "trust_region": "none"},
        "run": {"folder": str(place / "runs")},
        "sampling": {"max_new_tokens": 4},
    }  # fmt: skip
    (place / "first.yaml").write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, ["optimize", str(place / "first.yaml"), "--quiet"])
    assert result.exit_code == 0, result.output
    return place / "runs" / "first"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished, tmp_path / "first")
    return tmp_path / "first"
