"""Maps the folder `kernels/` to the package `embedgrad.kernels` and builds csrc/; everything else is in pyproject.toml.

Two libraries, both optional. `_native` (C++17, torch ops and the CPU core) is compiled against the torch it will be
loaded with, whose version its name carries; without a compiler the reference backend serves. `_cuda` (CUDA, a C
interface, no torch) is compiled where nvcc is; without it a GPU's tokens are chosen on the CPU. EMBEDGRAD_BUILD_EXT=0
skips both. Neither holds a symbol of Python's: a wheel fits every Python 3.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

CPU_FILES = [str(path) for path in sorted(Path("csrc").rglob("*.*")) if "cuda" not in path.parts]
SOURCES = [path for path in CPU_FILES if path.endswith(".cpp")]
HEADERS = [path for path in CPU_FILES if path.endswith((".h", ".inl"))]
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-g0"]
FLAGS += ["-Wno-c++20-extensions"]  # of torch's headers

CUDA_SOURCES = [str(path) for path in sorted(Path("csrc/cuda").glob("*.cu"))]
CUDA_TARGETS = ("80", "90", "100")  # machine code for these, and PTX of the last, which newer GPUs compile
# The runtime is linked in, hidden: it opens the driver when it is first called, and does not meet torch's.
CUDA_FLAGS = ["-O3", "-std=c++17", "-shared", "-cudart=static", "-Xfatbin=-compress-all"]
CUDA_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden,-g0", "-Xlinker=--exclude-libs=ALL,-s"]


def nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, of PATH, or where CUDA installs itself."""
    homes = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    places = [str(homes[0]) if len(homes) > 1 else None, None, str(homes[-1])]
    return next((found for place in places if (found := shutil.which("nvcc", path=place))), None)


def cuda_targets(compiler: str) -> list[str]:
    """nvcc's flags for the targets that this release of it knows."""
    said = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = [target for target in CUDA_TARGETS if f"compute_{target}" in said.split()]
    if not known:
        raise ValueError(f"{compiler} compiles for none of the GPUs that are served (sm_80 and later)")
    flags = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def build_cuda(folder: Path) -> None:
    """`_cuda.so` into `folder`, or one line that says why not; nothing is said where there is no nvcc."""
    library = folder / "_cuda.so"
    library.unlink(missing_ok=True)
    compiler = nvcc()
    if compiler is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        command = [compiler, *CUDA_FLAGS, *cuda_targets(compiler), "-o", str(library), *CUDA_SOURCES]
        print(" ".join(command), flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise ValueError((done.stdout.strip() or "no word").splitlines()[-1])
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        library.unlink(missing_ok=True)
        print(f"embedgrad: csrc/cuda is not built, tokens will be chosen on the CPU: nvcc says {error}")


def cxx() -> str | None:
    """The C++ compiler that setuptools calls, or None where it is not there."""
    command = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()
    while command and (command[0] == "env" or "=" in command[0] or command[0].endswith("ccache")):
        command = command[1:]
    return next((word for word in command[:1] if shutil.which(word)), None)


def extension() -> dict[str, Any]:
    """What setup() needs for csrc/, or nothing."""
    if os.environ.get("EMBEDGRAD_BUILD_EXT") == "0":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        if {"build_ext", "bdist_wheel", "editable_wheel"} & set(sys.argv):  # not while only metadata are asked for
            print("embedgrad: csrc/ is not built, because this build sees no torch.")
        return {}
    name = "_native.torch" + ".".join(re.findall(r"\d+", torch.__version__)[:2])

    class Build(BuildExtension):
        def run(self) -> None:
            here = Path(self.get_finalized_command("build_py").get_package_dir("embedgrad"))
            if self.inplace:  # a library for another torch would lie about
                for old in here.glob("_native*.so"):
                    old.unlink()
            super().run()
            if cxx() is not None:  # nvcc needs it, too
                build_cuda(here if self.inplace else Path(self.build_lib) / "embedgrad")

        def build_extensions(self) -> None:
            if cxx() is None:
                print("embedgrad: csrc/ is not built, for want of a C++17 compiler; the reference backend serves.")
                return
            super().build_extensions()

        def build_extension(self, ext: Any) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                print(f"embedgrad: csrc/ is not built, the reference backend serves: {error}")

        def get_ext_filename(self, ext_name: str) -> str:
            return str(Path(*ext_name.split(".")[:-1]) / f"{name}.so")

    class Wheel(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    module = CppExtension(
        "embedgrad._native",
        SOURCES,
        extra_compile_args=FLAGS,
        extra_link_args=["-fopenmp", "-Wl,-s"],
        depends=HEADERS,
        optional=True,
        py_limited_api=True,  # not linked with torch's Python half
    )
    commands = {"build_ext": Build.with_options(use_ninja=False), "bdist_wheel": Wheel}
    return {"ext_modules": [module], "cmdclass": commands}


setup(
    packages=[*find_packages(include=["embedgrad", "embedgrad.*"]), "embedgrad.kernels"],
    package_dir={"embedgrad": "embedgrad", "embedgrad.kernels": "kernels"},
    **extension(),
)
