"""Compiled libraries that are missing, or made for something else, are told by one sentence; then others serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from embedgrad import backends
from embedgrad.backends import BackendWarning, cuda_core, native_core
from embedgrad.cli import doctor
from embedgrad.generation.loops import loop_for
from embedgrad.generation.loops.plain import PlainLoop
from embedgrad.generation.slots import Limits, Slots
from embedgrad.util.errors import BackendError
from tests.engine.drawn import pair


def test_a_library_for_another_torch_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Although it might be loadable: nothing says that it would work."""
    monkeypatch.setattr(native_core, "__file__", str(tmp_path / "backends" / "native_core.py"))
    with pytest.raises(ImportError, match="was not built"):
        native_core.library_path()
    for torch_version in ("2.6", "2.13"):
        (tmp_path / f"_native.torch{torch_version}.so").touch()
    monkeypatch.setattr(torch, "__version__", "2.13.1+cpu")
    assert native_core.library_path() == tmp_path / "_native.torch2.13.so"
    monkeypatch.setattr(torch, "__version__", "2.14.0+cpu")
    with pytest.raises(ImportError, match=r"built for torch 2\.13, 2\.6, and this is torch 2\.14\.0\+cpu"):
        native_core.library_path()


def test_the_reference_serves_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError("csrc/ was built for torch 2.6, and this is torch 2.13.0")

    monkeypatch.setattr(backends.importlib, "import_module", missing)
    with pytest.raises(BackendError, match=r"built for torch 2\.6.*install embedgrad again where there is a C\+\+17"):
        backends.choose("native", torch.device("cpu"))
    monkeypatch.undo()
    monkeypatch.setattr(backends, "_native", lambda *_: (_ for _ in ()).throw(BackendError("Not built.")))
    with pytest.warns(BackendWarning, match=r"Not built\. The reference backend serves, more slowly"):
        assert backends.choose("auto", torch.device("cpu")).name == "reference"


@pytest.mark.parametrize(("version", "minor"), [("2.13.0+cpu", "2.13"), ("2.6.0", "2.6"), ("3.0a1.dev5", "3.0")])
def test_what_of_a_version_counts(version: str, minor: str) -> None:
    assert native_core._minor(version) == minor


def test_a_gpu_without_the_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The plain loop serves."""
    model = pair("llama", {}, dtype=torch.float64).model
    slots = Slots(1, model.config.vocab_size, 8, Limits(frozenset(), 9))
    monkeypatch.setattr(model, "device", torch.device("cuda"))
    monkeypatch.setattr(cuda_core, "__file__", str(tmp_path / "backends" / "cuda_core.py"))
    cuda_core.library.cache_clear()
    with pytest.warns(BackendWarning, match="csrc/cuda was not built: nvcc was not there .* chosen on the CPU"):
        assert isinstance(loop_for(model, slots, each_token=False), PlainLoop)


def test_the_cuda_library_needs_no_driver_to_be_loaded() -> None:
    try:
        core = cuda_core.library()
    except ImportError as error:
        pytest.skip(str(error))
    assert core.embedgrad_advance_cuda.argtypes is not None
    if not torch.cuda.is_available():
        with pytest.raises(ImportError, match="for GPUs of NVIDIA"):
            cuda_core.library_for(torch.device("cpu"))


def test_doctor_names_both_libraries(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_checks", lambda *_: [])
    doctor.run(as_json=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("library")]
    assert [line.split()[1] for line in lines][:2] == ["csrc:", "csrc/cuda:"]
    doctor.run(as_json=True)
    assert [x["name"] for x in json.loads(capsys.readouterr().out)["libraries"]][:2] == ["csrc", "csrc/cuda"]
