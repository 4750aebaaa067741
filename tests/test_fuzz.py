"""Damaged files of every kind: each reader answers with a value or with one of our errors, and with nothing else.

`make test-all` gives each reader a minute; EMBEDGRAD_FUZZ_SECONDS changes that. A failure names its seed.
"""

from __future__ import annotations

import os
import random
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from embedgrad.data.readers import read_rows
from embedgrad.engine.model import load_model
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.sandbox import compile_chat_template
from embedgrad.report.content import build
from embedgrad.report.markdown import render
from embedgrad.report.read import read_run
from embedgrad.train.checkpoints import load_latest
from embedgrad.train.optimize import optimize
from embedgrad.train.settings import load_run_config
from embedgrad.util.errors import EmbedGradError
from tests.model import tiny
from tests.train.training import TRAIN, VALIDATION, model_folder, quick_config, start_prompt, tiny_model

SECONDS = float(os.environ.get("EMBEDGRAD_FUZZ_SECONDS", "60"))
MOST = 8.0  # seconds that one file may take
ODD = (
    b"1e999", b"-1", b"0", b"99999999999999999999", b"null", b"[[[[[[[[", b'{"a":', b"true", b'""', b"NaN", b"\x00",
    b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\n", b"- &a [*a]", b"{{", b"%}", b"1" * 400, b"[" * 2000,
)  # fmt: skip
YAML = """model: {path: m, device: cpu}
prompt: "Say what it is."
data: {path: d.jsonl, query: text, target: label, labels: [good, bad], split: {train: 12, validation: 0.1, test: 8}}
optimize: {steps: 6, batch_size: 4, learning_rate: 0.1, trust_region: {kind: cosine, tau: 0.95}}
run: {folder: runs}
"""
Read = Callable[[Path], object]


def damaged(data: bytes, draw: random.Random) -> bytes:
    """`data` with one to five changes."""
    for _ in range(draw.randint(1, 5)):
        at = draw.randint(0, len(data))
        end = min(len(data), at + draw.choice((1, 1, 2, 8, 100)))
        kind = draw.randint(0, 5)
        if kind == 0:
            data = data[:at] + bytes(draw.randbytes(end - at)) + data[end:]
        elif kind == 1:
            data = data[:at] + data[end:]
        elif kind == 2:
            data = data[:at] + draw.choice(ODD) + data[end:]
        elif kind == 3:
            data = data[:at] + data[at:end] * draw.randint(2, 50) + data[end:]
        elif kind == 4:
            data = data[:at] if draw.random() < 0.3 else data[:at] + bytes(8) + data[at + 8 :]
        else:
            digits = [i for i in range(len(data)) if 48 <= data[i] < 58] if len(data) < 20_000 else []
            place = draw.choice(digits) if digits else at
            data = data[:place] + draw.choice(ODD[:4]) + data[place + 1 :]
    return data


def _model(path: Path) -> object:
    model = load_model(path, device="cpu", weights="stored")
    return model.tokenizer.encode("A film of joy, number 3")


def _template(path: Path) -> object:
    source = path.read_bytes().decode("utf-8", "replace")
    template = compile_chat_template(source)
    return template.render([{"role": "user", "content": "hi"}], {}, add_generation_prompt=True)


def _report(path: Path) -> object:
    return render(build([read_run(path)], 3), {}, "0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of every kind, undamaged."""
    place = tmp_path_factory.mktemp("whole")
    shutil.copytree(model_folder(), place / "model")
    tiny.write_gguf(place / "m.gguf", tiny.random_model())
    start_prompt(tiny_model()).save(place / "p.safetensors")
    (place / "run.yaml").write_text(YAML)
    (place / "d.jsonl").write_text('{"text": "joy 1", "label": "good"}\n{"text": "pain", "label": "bad"}\n')
    (place / "d.csv").write_text('text,label\n"joy, 1",good\npain,bad\n')
    (place / "chat.jinja").write_text(tiny.CHAT_TEMPLATE)
    model = tiny_model()
    optimize(model, start_prompt(model), TRAIN, VALIDATION, quick_config(), run_dir=place / "run")
    return place


TARGETS: dict[str, tuple[str, str, Read]] = {  # what is copied, the file in it that is damaged, its reader
    "safetensors": ("model", "model.safetensors", _model),
    "config.json": ("model", "config.json", _model),
    "tokenizer.json": ("model", "tokenizer.json", _model),
    "tokenizer_config.json": ("model", "tokenizer_config.json", _model),
    "gguf": ("m.gguf", "", _model),
    "prompt": ("p.safetensors", "", SoftPrompt.load),
    "yaml": ("run.yaml", "", load_run_config),
    "jsonl": ("d.jsonl", "", lambda path: list(read_rows(path))),
    "csv": ("d.csv", "", lambda path: list(read_rows(path))),
    "template": ("chat.jinja", "", _template),
    "checkpoint": ("run", "checkpoints/*.safetensors", lambda path: load_latest(path / "checkpoints", 100)),
    "metrics": ("run", "metrics.jsonl", _report),
    "summary": ("run", "summary.json", _report),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_file_is_read_or_refused(target: str, whole: Path, tmp_path: Path) -> None:
    source, inside, read = TARGETS[target]
    end, seed = time.monotonic() + SECONDS, 0
    copy = tmp_path / source
    (shutil.copytree if (whole / source).is_dir() else shutil.copy)(whole / source, copy)
    file = sorted(copy.glob(inside))[-1] if inside else copy
    data = file.read_bytes()
    while time.monotonic() < end:
        file.write_bytes(damaged(data, random.Random(seed)))
        begun = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told = ""
            try:
                read(copy)
            except EmbedGradError as error:
                told = str(error)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert "\n" not in told.strip(), f"seed {seed}: more than one line: {told}"
        assert time.monotonic() - begun < MOST, f"seed {seed} took {time.monotonic() - begun:.1f} s"
        seed += 1
    assert seed > 10
