"""TensorBoard and Weights & Biases: what is written offline is read back; resumed runs go on; failures cost nothing."""

from __future__ import annotations

import builtins
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from embedgrad.train.loggers import Dispensable, open_loggers
from embedgrad.train.loggers.scalars import scalars
from embedgrad.train.optimize import optimize
from embedgrad.train.progress import Progress, Quiet, Several
from embedgrad.train.settings import RunSection
from embedgrad.util.errors import ConfigError
from tests.train.test_resume import StopAt
from tests.train.training import TRAIN, VALIDATION, quick_config, start_prompt, tiny_model

BLOCK = 2**15  # bytes, of LevelDB's log


class Heard(Quiet):
    """Records all calls; raises an error at `fatal`."""

    def __init__(self, fatal: int = 0) -> None:
        self.steps: list[int] = []
        self.notes: list[str] = []
        self.stopped = 0
        self.fatal = fatal

    def step(self, record: Mapping[str, Any]) -> None:
        if record["step"] == self.fatal:
            raise OSError("no space left on device\nreally")
        self.steps.append(record["step"])

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stop(self) -> None:
        self.stopped += 1


def run(folder: Path, *listeners: Progress, resume: Any = False) -> list[dict[str, Any]]:
    """The tests' short run with these listeners; its records."""
    model = tiny_model()
    optimize(
        model, start_prompt(model), TRAIN, VALIDATION, quick_config(), run_dir=folder,
        progress=Several(*listeners), resume=resume,
    )  # fmt: skip
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(name: str, folder: Path, description: Mapping[str, Any] | None = None) -> Progress:
    (logger,) = open_loggers([name], folder, description or {}, pytest.fail)
    return logger


def expected(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Name to (step, value), from the records of metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record["kind"] in ("step", "validation"):
            for name, value in scalars(record).items():
                found.setdefault(name, []).append((record["step"], value))
    return found


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same, read back from TensorBoard's files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    reader.Reload()
    assert [event.step for event in reader.Histograms("train/similarity")] == list(range(1, 8))
    return {
        tag: [(event.step, pytest.approx(event.value, rel=1e-5)) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind 7 bytes of W&B's own."""
    assert data[:4] == b":W&B"
    position, kept = 7, b""
    while position + 7 <= len(data):
        if (left := BLOCK - position % BLOCK) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        kept += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, last part
            yield kept
            kept = b""


def history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same, read back from the one W&B log of a folder."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # ends the process that writes, as the end of a program does
    (file,) = folder.glob("*.wandb")
    found: dict[str, list[tuple[int, float]]] = {}
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in items.items():
                if isinstance(value, (int, float)) and not name.startswith("_"):
                    found.setdefault(name, []).append((int(items["_step"]), float(value)))
    return found


def test_tensorboard_says_what_the_metrics_say(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    records = run(tmp_path / "run", logged("tensorboard", tmp_path / "run"))
    assert events(tmp_path / "run" / "tensorboard") == expected(records)


def test_a_resumed_run_goes_on_in_the_same_tensorboard_log(tmp_path: Path) -> None:
    """The first session dies after step 5 and its last checkpoint is of step 4: step 5 is taken, and logged, again."""
    pytest.importorskip("tensorboard")

    class Killed(Quiet):
        def step(self, record: Mapping[str, Any]) -> None:
            if record["step"] == 5:
                raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(folder, logged("tensorboard", folder), Killed())
    records = run(folder, logged("tensorboard", folder), resume=True)
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, 8))
    assert events(folder / "tensorboard") == expected(records)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))


@pytest.mark.usefixtures("offline")
def test_wandb_is_offline_and_says_what_the_metrics_say(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    records = run(folder, logged("wandb", folder, {"optimize": {"steps": 7}}))
    (session,) = (folder / "wandb").glob("offline-run-*")
    assert session.name.endswith((folder / "wandb" / "id").read_text().strip())
    assert history(session) == expected(records)


@pytest.mark.usefixtures("offline")
def test_a_resumed_run_keeps_its_wandb_id_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, logged("wandb", folder), StopAt(4))
    records = run(folder, logged("wandb", folder), resume=True)
    logs = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    known = (folder / "wandb" / "id").read_text().strip()
    assert [log.name for log in logs] == [f"run-{known}.wandb"] * 2
    first, second = (history(log.parent) for log in logs)
    assert first["train/loss"] == expected(records)["train/loss"][:4]
    assert second == expected(records)  # the newest log holds the whole run


@pytest.mark.usefixtures("offline")
def test_wandb_disabled_by_its_own_variable_writes_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run(tmp_path / "run", logged("wandb", tmp_path / "run"))
    assert not list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_import = builtins.__import__

    def refused(module: str, *arguments: Any, **options: Any) -> Any:
        if module.split(".")[0] == name:
            raise ImportError(f"No module named {module!r}")
        return true_import(module, *arguments, **options)

    monkeypatch.setattr("importlib.import_module", refused)
    with pytest.raises(ConfigError, match=rf"pip install 'embedgrad\[{name}\]'\.$"):
        open_loggers([name], tmp_path, {}, pytest.fail)
    assert list(tmp_path.iterdir()) == []


def test_names_are_checked_in_the_configuration() -> None:
    assert RunSection(loggers="wandb").loggers == ("wandb",)
    assert RunSection(loggers=["tensorboard", "wandb"]).loggers == ("tensorboard", "wandb")
    with pytest.raises(ConfigError, match=r"loggers\.0 is 'tensorbord', but should be 'tensorboard' or 'wandb'\.$"):
        RunSection(loggers=["tensorbord"])
    with pytest.raises(ConfigError, match="'mlflow' is no logger"):
        open_loggers(["mlflow"], Path("nowhere"), {}, pytest.fail)


def test_a_logger_that_fails_is_left_out_and_the_run_goes_on(tmp_path: Path) -> None:
    heard, failing = Heard(), Heard(fatal=3)
    run(tmp_path / "run", heard, Dispensable(failing, "failing", heard.note))
    assert heard.steps == list(range(1, 8))
    assert failing.steps == [1, 2]
    assert failing.stopped == 0
    assert [note for note in heard.notes if "failing" in note] == [
        "The logger failing failed and is left out from here on (no space left on device); metrics.jsonl goes on."
    ]


def test_several_listeners_are_all_stopped() -> None:
    class Bad(Heard):
        def stop(self) -> None:
            raise OSError("no")

    heard = Heard()
    with pytest.raises(OSError, match="no"):
        Several(Bad(), heard).stop()
    assert heard.stopped == 1
