"""The wheel and the source distribution: built as users build them, run where nothing can be compiled."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.csrc.core import compiler
from tests.model.tiny import write_folder

ROOT = Path(__file__).parents[1]
NATIVE = f"embedgrad/_native.torch{'.'.join(torch.__version__.split('.')[:2])}.so"
PROGRAM = """
import shutil, sys
import embedgrad
from embedgrad import Example, Sampling, SoftPrompt, Template, generate, load_model, loss_and_grad
assert not any(map(shutil.which, ("c++", "g++", "gcc", "cc", "clang", "nvcc"))), "a compiler is here"
assert embedgrad.__file__.startswith(sys.prefix), embedgrad.__file__
model = load_model(sys.argv[1])
prompt = SoftPrompt.from_ids(model, [9, 30], template=Template.plain())
loss, grad = loss_and_grad(model, prompt, [Example([10, 11], [20]), Example([12], [30, 31])])
answers = generate(model, prompt, [[10], [11]], Sampling(max_new_tokens=5, temperature=1.0))
print(model.backend, model.native_decoder is not None, float(grad.norm()) > 0, len(answers))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output; fails with the whole of it."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dist/ of a copy of the sources: `python -m build` makes the wheel out of the source distribution, isolated."""
    if compiler() is None:
        pytest.skip("no C++ compiler: neither CXX nor c++, g++ or clang++")
    if importlib.util.find_spec("build") is None:
        pytest.skip("the package build is not installed")
    folder = tmp_path_factory.mktemp("sources")
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "embedgrad", ignore=ignored)
    environment = {**os.environ, "EMBEDGRAD_BUILD_PYTHON": sys.executable}
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", cwd=folder / "embedgrad", **environment)
    return folder / "dist"


@pytest.mark.slow
def test_wheel_runs_where_there_is_no_compiler(distributions: Path, tmp_path: Path) -> None:
    """In a new environment that has nothing but the wheel, and of this one the packages it depends on."""
    (wheel,) = distributions.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert NATIVE in names
    assert ("embedgrad/_cuda.so" in names) == (shutil.which("nvcc") is not None)
    assert not [name for name in names if name.startswith(("tests", "bench", "csrc", "build_backend"))]
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "new", cwd=tmp_path, **os.environ)
    python = tmp_path / "new" / "bin" / "python"
    (packages,) = (tmp_path / "new" / "lib").glob("python*/site-packages")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=tmp_path, **os.environ)
    others = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(others) + "\n")
    write_folder(tmp_path / "model", "llama")
    said = run(python, "-c", PROGRAM, tmp_path / "model", cwd=tmp_path, PATH=str(python.parent))
    assert said.splitlines()[-1] == "native True True 2"


@pytest.mark.slow
def test_source_distribution_holds_what_a_build_needs(distributions: Path, tmp_path: Path) -> None:
    """Its wheel is the one above; without the extension it is the same for every machine."""
    (archive,) = distributions.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (sources,) = tmp_path.iterdir()
    tracked = subprocess.run(["git", "ls-files", "csrc", "kernels"], cwd=ROOT, capture_output=True, text=True).stdout
    assert [name for name in tracked.split() if not (sources / name).is_file() and (ROOT / name).is_file()] == []
    environment = {**os.environ, "EMBEDGRAD_BUILD_EXT": "0"}
    pure = tmp_path / "pure"
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", pure, sources, cwd=tmp_path, **environment)
    (wheel,) = pure.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
