"""Which kernels a step consists of, and how much of its time the device works."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

from bench.harness.contenders import Case
from bench.harness.markdown import table
from bench.harness.rows import Row
from bench.on_gpu.section import Bench, Job, Section, figure
from bench.on_gpu.show import grouped, ms, short
from bench.on_gpu.steps import WARM, OurStep

TOP, SHOWN = 30, 12  # kernels that are recorded, and in the table


def _profile(bench: Bench, shape: str) -> list[Row]:
    model = bench.model(bench.first)
    bench.forget()
    step = OurStep(bench, model, Case.parse(shape), "all")
    for _ in range(WARM):
        step.one()
    found = bench.device.profile(step.one)
    top = sorted(found.kernels.items(), key=lambda item: -item[1][0])[:TOP]
    wall = statistics.median(bench.device.wall_seconds(step.one, 5))  # a profiler makes the step longer
    case = {"model": bench.first, "shape": shape, "policy": "all"}
    return [figure(
        "profile", "embedgrad", [found.busy], case, wall_seconds=wall,
        launches=sum(count for _, count in found.kernels.values()),
        top=[[name, seconds, count] for name, (seconds, count) in top],
    )]  # fmt: skip


def _jobs(bench: Bench) -> Iterator[Job]:
    for shape in bench.sizes.steps[:3]:
        yield Job(f"profile {shape}", partial(_profile, bench, shape), 6)


def _table(rows: Sequence[Row]) -> str:
    cells: list[Sequence[object]] = []
    for (shape, at), found in grouped(rows, lambda one: str(one.case["shape"])).items():
        one = found[-1]
        wall = one.more.get("wall_seconds")
        top = "; ".join(f"{short(name)} {s * 1e3:.2f} ({n})" for name, s, n in one.more["top"][:SHOWN])
        share = f"{one.median / wall:.0%}" if wall else None
        cells.append((shape, at, ms(one), share, one.more["launches"], top))
    heads = ("prompt/query/batch", "commit", "kernels, ms", "of the step", "launches", "most of it, ms (launches)")
    return table(heads, cells)


SECTION = Section("profile", "Which kernels does a step consist of?", 25, _jobs, _table)
