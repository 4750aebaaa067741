"""What the card does at most: bytes copied, operations of one large product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bench.harness.markdown import table
from bench.harness.rows import Row
from bench.on_gpu.section import Bench, Job, Section, figure, torch_version
from bench.on_gpu.show import grouped, pick


def _jobs(bench: Bench) -> Iterator[Job]:
    device, size = bench.device, bench.sizes.squared

    def copy() -> list[Row]:
        source, target = (device.empty(bench.sizes.copied, dtype=torch.uint8) for _ in range(2))
        rates = [2 * source.nbytes / seconds for seconds in device.seconds(lambda: target.copy_(source))]
        case = {"what": "copy", "bytes": source.nbytes}
        return [figure("ceilings", "torch", rates, case, version=torch_version(), unit="bytes/s")]

    def product() -> list[Row]:
        x, y, out = device.random(size, size), device.random(size, size), device.empty(size, size)
        rates = [2 * size**3 / seconds for seconds in device.seconds(lambda: torch.mm(x, y, out=out), 0.2)]
        case = {"what": "product", "size": size}
        return [figure("ceilings", "torch", rates, case, version=torch_version(), unit="operations/s")]

    yield Job("copy", copy)
    yield Job("product", product)


def _table(rows: Sequence[Row]) -> str:
    cells = []
    for (_, at), found in grouped(rows, lambda one: 0).items():
        copy, product = pick(found, "torch", what="copy"), pick(found, "torch", what="product")
        cells.append(
            (at, f"{copy.median / 1e12:.2f}" if copy else None, f"{product.median / 1e12:.0f}" if product else None)
        )
    return table(("commit", "copy, TB/s (read and written)", "bf16 product, TFLOP/s"), cells)


SECTION = Section("ceilings", "What does the card do at most?", 5, _jobs, _table)
