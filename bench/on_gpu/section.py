"""A section of `bench gpu`: jobs that each give rows, with what they cost, and the models that they share."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import embedgrad
from bench.harness.models import QWEN_1_5B, QWEN_7B, config_of, random_model
from bench.harness.rows import Row, row
from bench.on_gpu.device import Device
from embedgrad import backends
from embedgrad.engine.model import Model
from embedgrad.model.config import ModelConfig

OURS = f"embedgrad {embedgrad.__version__}"


@dataclass(frozen=True)
class Sizes:
    """What is asked, large enough for a GPU.

    models: configurations by name. steps: prompt/query/batch of the first model, most telling first. trees: shared
    tokens, own tokens, branches, for attention. heads: query heads, key heads, dimension. losses: targets, vocabulary,
    width. matrices: outputs, inputs; rows: of their activations. widths: width, feed-forward, heads. decoding: queries
    at once. tests: files or folders, and the share of the time that is left which each may take.
    """

    models: dict[str, ModelConfig]
    steps: tuple[str, ...] = ("64/64/8", "200/50/32", "512/120/64", "32/250/32")
    trees: tuple[tuple[int, int, int], ...] = ((64, 64, 8), (512, 112, 32), (0, 4096, 1), (0, 512, 16), (1024, 512, 8))
    heads: tuple[tuple[int, int, int], ...] = ((12, 2, 128), (9, 3, 64))
    losses: tuple[tuple[int, int, int], ...] = (
        (64, 151_936, 1536), (2048, 151_936, 1536), (8192, 151_936, 1536), (2048, 152_064, 3584),
    )  # fmt: skip
    matrices: tuple[tuple[int, int], ...] = ((17_920, 1536), (1536, 8960), (37_888, 3584))
    rows: tuple[int, ...] = (1, 16, 64, 512, 4096)
    tokens: tuple[int, ...] = (512, 4096, 32_768)
    widths: tuple[tuple[int, int, tuple[int, int, int]], ...] = (
        (1536, 8960, (12, 2, 128)), (3584, 18_944, (28, 4, 128)),
    )  # fmt: skip
    prompts: tuple[tuple[int, int], ...] = ((32, 1536), (256, 3584))
    decoding: tuple[int, ...] = (1, 8, 32, 256)
    prompt_tokens: int = 190
    query_tokens: int = 20
    tests: tuple[tuple[str, float], ...] = (("tests/engine/test_on_a_gpu.py", 0.5), ("tests/kernels", 1.0))
    new_tokens: int = 128
    copied: int = 1 << 30
    squared: int = 8192
    repeats: int = 12


FULL = Sizes({name: config_of(name) for name in (QWEN_1_5B, QWEN_7B)})


def tiny() -> Sizes:
    """Sizes for Triton's interpreter."""
    small: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        "vocab_size": 300,
    }  # fmt: skip
    models = {name: replace(config, **small, windows=config.windows[:2]) for name, config in FULL.models.items()}
    return Sizes(
        models, steps=("4/3/2",), trees=((5, 4, 2), (0, 6, 1)), heads=((4, 2, 16),), losses=((5, 40, 32),),
        matrices=((48, 64),), rows=(2, 40), tokens=(6,), widths=((32, 48, (4, 2, 16)),), prompts=((3, 32),),
        decoding=(2,), prompt_tokens=4, query_tokens=3, new_tokens=3, copied=1 << 10, squared=8, repeats=1,
        tests=(("tests/kernels/test_launch.py", 1.0),),
    )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Something that is measured at once. cost: seconds that it takes at least on a GPU. needs: packages without which
    it is left out."""

    name: str
    act: Callable[[], Iterable[Row]]
    cost: float = 3.0
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """cost: seconds that it takes on an H100. title: what its rows answer. jobs: most important first."""

    name: str
    title: str
    cost: float
    jobs: Callable[[Bench], Iterator[Job]]
    table: Callable[[Sequence[Row]], str]


@dataclass
class Bench:
    """What the jobs of one section share."""

    device: Device
    sizes: Sizes
    until: float = float("inf")  # time.time() at which it must have ended
    threads: int = 1  # for tests
    _model: tuple[tuple[str, str], Model] | None = field(default=None, repr=False)

    @property
    def first(self) -> str:
        """The name of the first model."""
        return next(iter(self.sizes.models))

    def model(self, name: str, form: str = "compute") -> Model:
        """A model with random weights; the last one is kept, and no other."""
        if self._model is None or self._model[0] != (name, form):
            self._model = None
            self.device.release()
            where, dtype = self.device.where, self.device.dtype
            ops = backends.choose("triton", where, dtype)
            self._model = (name, form), random_model(self.sizes.models[name], name, where, dtype, ops, form)
        return self._model[1]

    def forget(self) -> None:
        """Give back what the model holds besides its weights."""
        if self._model is not None:
            self._model[1].release_memory()
        self.device.release()


def figure(
    section: str, contender: str, values: Sequence[float], case: Mapping[str, Any],
    *, version: str = OURS, unit: str = "s", peak_bytes: int | None = None, counted: bool = False, **more: Any,
) -> Row:  # fmt: skip
    """A row of this question."""
    return row(
        "gpu", contender, version, values, case={"section": section, "device": "cuda", **case}, unit=unit,
        peak_bytes=peak_bytes, counted=counted, **more,
    )  # fmt: skip


def failure(section: str, contender: str, case: Mapping[str, Any], version: str, why: str) -> Row:
    """A row that says that a contender cannot do it, and why."""
    return figure(section, contender, [0.0], case, version=version, unit="none", counted=True, error=why)


def installed(name: str) -> str | None:
    """The package and its version, or None."""
    if importlib.util.find_spec(name.replace("-", "_")) is None:
        return None
    return f"{name} {importlib.metadata.version(name)}"


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """‖found − truth‖ / ‖truth‖ (Frobenius)."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def torch_version() -> str:
    """What torch's own contenders are."""
    return f"torch {torch.__version__}"
