"""An optimisation step: ours as a graph, one by one, pipelined and eager; PEFT, transformers, and the floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import embedgrad
from bench.harness import floor
from bench.harness.contenders import Case, task, tree_of
from bench.harness.markdown import table
from bench.harness.models import QWEN_7B
from bench.harness.rows import Row
from bench.on_gpu.others import NEEDS, Twins
from bench.on_gpu.section import Bench, Job, Section, failure, figure, torch_version
from bench.on_gpu.show import commit, grouped, ms, pick
from embedgrad.engine.model import Model
from embedgrad.engine.prompt_trainer import PromptTrainer
from embedgrad.engine.runner import CudaCapture, Launched
from embedgrad.engine.tree import prepare
from embedgrad.maths.optimizer import AdamW
from embedgrad.maths.trust_region import CosineCone
from embedgrad.prompt.rendering import render

WARM = 3  # steps before any counts: a class of sizes is compiled in the first and captured in the second
WEIGHTS = {"compute": "bf16", "int8": "int8", "int4": "int4"}


@dataclass
class _Capture:
    """Captures as the trainer does, and keeps the last replay, so that it can be timed alone."""

    interpreted: bool
    replay: Callable[[], object] | None = field(default=None)

    def __post_init__(self) -> None:
        self._capture = None if self.interpreted else CudaCapture()

    def __call__(self, launch: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        if self._capture is not None:
            self.replay, numbers = self._capture(launch)
        else:
            numbers = launch()
            self.replay = lambda: numbers.copy_(launch())
        return self.replay, numbers


class OurStep:
    """A step of `embedgrad optimize` on one batch, over and over."""

    def __init__(self, bench: Bench, model: Model, case: Case, policy: str) -> None:
        self._soft, self._examples = task(model, case)
        sequences = prepare([render(model, self._soft, example) for example in self._examples])
        self._batch = sequences, [1.0] * len(sequences)
        self._model, self._policy = model, policy
        self.capture = _Capture(bench.device.interpreted)
        e = self._soft.embeddings.float().clone()
        self._trainer = PromptTrainer(
            model, (e, torch.zeros_like(e), torch.zeros_like(e)), self._soft.anchor.float(), [self._batch],
            region=CosineCone(0.95), rule=AdamW(), clip_norm=1.0, policy=policy, memory_budget=None,
            capture=self.capture, static=True,
        )  # fmt: skip
        self._number = 0

    def launch(self) -> Launched:
        """Everything of a step that does not wait for the device."""
        self._number += 1
        return self._trainer.launch(self._trainer.prepare(self._batch), self._number, 1e-4)

    def one(self) -> float:
        """A step, read at once; its loss."""
        return self._trainer.read(self.launch()).loss

    def pipelined(self, steps: int) -> float:
        """Steps of which each is launched before the one before it is read: seconds a step."""
        started, last = time.perf_counter(), self.launch()
        for _ in range(steps - 1):
            new = self.launch()
            self._trainer.read(last)
            last = new
        self._trainer.read(last)
        return (time.perf_counter() - started) / steps

    def eager(self) -> float:
        """`loss_and_grad` by itself: render, pack, launch one by one, read; the loss."""
        return embedgrad.loss_and_grad(self._model, self._soft, self._examples, policy=self._policy)[0]


def ours(bench: Bench, name: str, form: str, shape: str, policy: str) -> list[Row]:
    """Our rows of one case."""
    model, device, case = bench.model(name, form), bench.device, Case.parse(shape)
    bench.forget()
    step = OurStep(bench, model, case, policy)
    told = _case(name, form, shape, policy=policy, tokens=tree_of(model, case).num_tokens)
    losses: list[float] = []

    def warm() -> None:
        losses.extend([step.one() for _ in range(WARM)])

    peak, repeats = device.peak_bytes(warm), bench.sizes.repeats
    rows = [
        _row(told, "step", device.wall_seconds(step.one, repeats), peak or None, loss=losses[0],
             graph=step.capture.replay is not None),
        _row(told, "pipelined", [step.pipelined(max(repeats, 2)) for _ in range(min(repeats, 3))]),
    ]  # fmt: skip
    if step.capture.replay is not None:
        rows.append(_row(told, "device", device.replay_seconds(step.capture.replay)))
    bench.forget()
    loss = [step.eager()]
    seconds = device.wall_seconds(lambda: loss.append(step.eager()), repeats)
    return [*rows, _row(told, "loss_and_grad", seconds, loss=loss[0], same_bits=len(set(loss)) == 1)]


def _case(name: str, form: str, shape: str, **more: int | str) -> dict[str, int | float | str]:
    return {"model": name, "weights": WEIGHTS[form], "shape": shape, **more}


def _row(
    told: dict[str, int | float | str], way: str, seconds: Sequence[float], peak: int | None = None, **more: Any
) -> Row:
    return figure("step", "embedgrad", seconds, {**told, "way": way}, peak_bytes=peak, **more)


def measured_floor(bench: Bench, name: str, shape: str) -> list[Row]:
    """How long cuBLAS takes for the step's products."""
    model = bench.model(name)
    bench.forget()
    tree = tree_of(model, Case.parse(shape))
    seconds = floor.seconds(model.config, tree, bench.device.where)
    return [figure("step", "floor", [seconds], _case(name, "compute", shape), version=torch_version())]


def another(bench: Bench, twins: Twins, name: str, contender: str, shape: str) -> list[Row]:
    """The step of PEFT or transformers on the same weights."""
    bench.forget()
    told = _case(name, "compute", shape)
    build, version = twins.build(contender)
    losses: list[float] = []
    try:
        step = build(Case.parse(shape))
        peak = bench.device.peak_bytes(lambda: losses.extend(step()[0] for _ in range(2)))
        seconds = bench.device.wall_seconds(step, max(1, bench.sizes.repeats // 2))
    except torch.cuda.OutOfMemoryError:
        return [failure("step", contender, told, version, "out of memory")]
    return [figure("step", contender, seconds, told, version=version, peak_bytes=peak or None, loss=losses[0])]


def _jobs(bench: Bench) -> Iterator[Job]:
    """Ours and the floor at every shape first, then the others."""
    name = bench.first
    for shape in bench.sizes.steps:
        yield Job(f"step {shape}", partial(ours, bench, name, "compute", shape, "all"), 6)
        yield Job(f"floor {shape}", partial(measured_floor, bench, name, shape), 3)
    twins = Twins(bench.model(name))
    for shape in bench.sizes.steps:
        for contender in ("peft", "transformers"):
            run = partial(another, bench, twins, name, contender, shape)
            yield Job(f"{contender} {shape}", run, 5, needs=NEEDS[contender])


def _more_jobs(bench: Bench) -> Iterator[Job]:
    """Other policies and weights of the first model, then the larger model."""
    name = bench.first
    for form, policy in (("compute", "layer"), ("int8", "all"), ("int4", "all")):
        for shape in bench.sizes.steps[:2]:
            yield Job(f"step {shape}, {form}, {policy}", partial(ours, bench, name, form, shape, policy), 8)
    if QWEN_7B in bench.sizes.models:
        shape = bench.sizes.steps[min(1, len(bench.sizes.steps) - 1)]
        yield Job(f"7B, step {shape}", partial(ours, bench, QWEN_7B, "compute", shape, "all"), 25)
        yield Job(f"7B, floor {shape}", partial(measured_floor, bench, QWEN_7B, shape), 5)


def _table(rows: Sequence[Row]) -> str:
    heads = ("ms", "prompt/query/batch", "policy", "commit", "PEFT", "transformers", "`loss_and_grad`",
             "step", "pipelined", "device alone", "floor", "peak MiB: PEFT / transformers / ours")  # fmt: skip
    cells: list[Sequence[object]] = []
    mine = [one for one in rows if one.contender == "embedgrad"]
    for (case, at), found in grouped(mine, _asked).items():
        assert isinstance(case, tuple)
        model, weights, shape, policy = case
        beside = [r for r in rows if r.case["shape"] == shape and r.case["model"] == model and commit(r) == at]
        beside = [r for r in beside if weights == "bf16"]
        peft, plain, least = (pick(beside, name) for name in ("peft", "transformers", "floor"))
        ways = [pick(found, "embedgrad", way=way) for way in ("loss_and_grad", "step", "pipelined", "device")]
        peaks = [one.peak_bytes for one in (ways[1] or ways[0], ways[0]) if one is not None and one.peak_bytes]
        mib = [r.peak_bytes if r else None for r in (peft, plain)] + [peaks[0] if peaks else None]
        told = " / ".join("–" if nbytes is None else f"{nbytes / 2**20:,.0f}" for nbytes in mib) if any(mib) else None
        cells.append((
            f"{str(model).removeprefix('Qwen2.5-Math-')} {weights}", shape, f"`{policy}`", at, ms(peft), ms(plain),
            *map(ms, ways), ms(least), told,
        ))  # fmt: skip
    return table(heads, cells)


def _asked(one: Row) -> tuple[str, ...]:
    return tuple(str(one.case[name]) for name in ("model", "weights", "shape", "policy"))


SECTION = Section("step", "How long is an optimisation step?", 60, _jobs, _table)
MORE = Section("forms", "With less memory, other weights, a larger model?", 90, _more_jobs, lambda rows: "")
