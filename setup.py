"""Maps the folder `kernels/` to the package `embedgrad.kernels` and builds csrc/; everything else is in pyproject.toml.

The extension is optional: without a C++17 compiler, or with EMBEDGRAD_BUILD_EXT=0, the reference backend serves. It is
compiled against the torch that it will be loaded with, which an isolated build would not see; hence
`pip install --no-build-isolation` (the Makefile does that).
"""

import os
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

SOURCES = [
    str(path) for pattern in ("*.cpp", "cpu/*.cpp", "decode/*.cpp") for path in sorted(Path("csrc").glob(pattern))
]
HEADERS = [
    str(path)
    for pattern in ("*.h", "common/*.h", "cpu/*.h", "cpu/*.inl", "decode/*.h", "decode/*.inl")
    for path in sorted(Path("csrc").glob(pattern))
]
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-g0"]


def extension() -> dict[str, Any]:
    """What setup() needs for csrc/, or nothing."""
    if os.environ.get("EMBEDGRAD_BUILD_EXT") == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("embedgrad: csrc/ is not built, because this build does not see torch; use --no-build-isolation.")
        return {}

    class Build(BuildExtension):
        def build_extension(self, ext: Any) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                print(
                    f"embedgrad: csrc/ is not built (it needs a C++17 compiler), the reference backend serves: {error}"
                )

    module = CppExtension(
        "embedgrad._native",
        SOURCES,
        extra_compile_args=FLAGS,
        extra_link_args=["-fopenmp"],
        depends=HEADERS,
        optional=True,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build.with_options(use_ninja=False)}}


setup(
    packages=[*find_packages(include=["embedgrad", "embedgrad.*"]), "embedgrad.kernels"],
    package_dir={"embedgrad": "embedgrad", "embedgrad.kernels": "kernels"},
    **extension(),
)
