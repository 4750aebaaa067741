"""The model files that a question is asked of: what `--model` names, and how rows call them."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.rows import Row

DEFAULT = "smollm2"
DEFAULT_TITLE = "SmolLM2-135M-Instruct.Q4_1"  # of rows that were recorded before rows named their model
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # that the gguf package writes


@dataclass(frozen=True)
class ModelFile:
    """A model on disk. title: what its rows are called. types: those of its matrices, the one with most bytes first."""

    path: Path
    title: str
    types: str


def add_argument(parser: argparse.ArgumentParser, *, several: bool = True) -> None:
    """The option `--model`."""
    parser.add_argument(
        "--model", nargs="*" if several else None, default=[DEFAULT] if several else DEFAULT, metavar="FILE",
        help=f"GGUF files or model folders; {DEFAULT} (the default) is SmolLM2-135M-Instruct in Q4_1, {DEFAULT}:TYPE "
        f"the same with every matrix quantised anew to one of {', '.join(TYPES)}",
    )  # fmt: skip


@contextlib.contextmanager
def model_files(names: Sequence[str]) -> Iterator[list[ModelFile]]:
    """What `--model` named. Files that are written for it are there until the block ends.

    SystemExit with a sentence where a name is neither a model nor "smollm2".
    """
    from embedgrad.tasks import smollm2
    from embedgrad.util.errors import EmbedGradError

    with tempfile.TemporaryDirectory() as folder:
        found = []
        for name in names:
            known, _, kind = name.partition(":")
            try:
                if known != DEFAULT or Path(name).exists():
                    path = Path(name)
                elif not kind:
                    path = smollm2.path()
                elif kind in TYPES:
                    path = Path(folder) / f"SmolLM2-135M-Instruct.{kind}.gguf"
                    requantise(smollm2.path(), path, kind)
                else:
                    raise SystemExit(f"--model {name}: the type after the colon is one of {', '.join(TYPES)}.")
                found.append(ModelFile(path, path.stem if path.is_file() else path.resolve().name, _types(path)))
            except EmbedGradError as error:
                raise SystemExit(f"--model {name}: {error}") from None
        yield found


def by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each model, by its title and types."""
    found: dict[str, list[Row]] = {}
    for one in rows:
        title = str(one.case.get("model", DEFAULT_TITLE))
        found.setdefault(f"{title} ({one.case['types']})" if "types" in one.case else title, []).append(one)
    return found


def _types(path: Path) -> str:
    from embedgrad.model.checkpoint import read_checkpoint

    tensors = read_checkpoint(path).tensors
    total: Counter[str] = Counter()
    for name, shape in tensors.shapes().items():
        raw = tensors.raw(name)
        if len(shape) == 2:
            value = tensors.get(name) if raw is None else raw[1]
            total[str(value.dtype).removeprefix("torch.") if raw is None else raw[0]] += value.nbytes
    return ", ".join(kind for kind, _ in total.most_common())


def requantise(source: Path, target: Path, kind: str) -> None:
    """A copy of a GGUF file in which every matrix has the type `kind`, one of TYPES."""
    import gguf
    from gguf.quants import dequantize, quantize

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, _value(reader.fields["general.architecture"]))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, _value(field), field.types[0], sub_type=of)
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) < 2:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _value(field: Any) -> Any:
    return field.contents()
