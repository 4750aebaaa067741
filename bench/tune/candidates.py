"""What the tuner tries: launch parameters of each kernel, and the shapes of docs/performance.md they are compared on.

The parameters come from those in use, from what others publish for Hopper (torch's templates for FlexAttention: D 64
forward 128, 128, 3 stages, 4 warps, D 128 forward 128, 64, 3, 8, both backward 64, 128, 3, 8 for dK and dV and
128, 64, 3, 8 for dQ; flash-linear-attention: tile 128, step 64, 8 warps; Liger-Kernel and unsloth for rows: 4 warps, 8
from 2,048 columns, 16 from 8,192), and from neighbours of both. A key that a candidate does not name keeps the value in
use. Whatever does not fit a GPU is dropped there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product

import torch

from embedgrad.backends.launch_check import attention, products, rowwise
from embedgrad.backends.launch_check.attention import DKV, DQ, FORWARD, Tree
from embedgrad.backends.launch_check.case import Case

Options = dict[str, int]
BF16 = torch.bfloat16
TOKENS = 4096


@dataclass(frozen=True)
class Question:
    """One row of the launch table to be found.

    kernel, bytes, at_least, at_most: what the row is for. cases: the shapes; a candidate's score is the geometric mean
    of its times relative to those of the parameters in use. candidates: parameters to try, without those in use.
    """

    kernel: str
    cases: tuple[Case, ...]
    candidates: tuple[Options, ...]
    bytes: tuple[int, ...] = (2,)
    at_least: dict[str, int] = field(default_factory=dict)
    at_most: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        limits = [f"{name} {self.at_least.get(name, '')}..{most}" for name, most in self.at_most.items()]
        limits += [f"{name} {least}.." for name, least in self.at_least.items() if name not in self.at_most]
        return ", ".join([self.kernel, *limits])


def _tiles(*keys: str) -> tuple[str, ...]:
    return (*keys, "num_warps", "num_stages")


def _options(keys: tuple[str, ...], rows: Iterable[tuple[int, ...]]) -> tuple[Options, ...]:
    return tuple(dict(zip(keys, row, strict=True)) for row in rows)


_TREES: tuple[Tree, ...] = ((512, 112, 32), (0, 4096, 1), (0, 512, 16), (64, 64, 8))
"""Prompt tokens, tokens of a branch, branches. The last one is small enough to find its data in the L2 cache."""
_HEADS = {64: (9, 3, 64), 128: (12, 2, 128), 256: (8, 4, 256)}
_NARROWER = {64: 1, 128: 65, 256: 129}

# BLOCK_Q, BLOCK_K, num_warps, num_stages
_ATTENTION: dict[int, dict[str, tuple[tuple[int, int, int, int], ...]]] = {
    64: {
        FORWARD: ((128, 128, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
                  (64, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 4)),
        DQ: ((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 3), (128, 64, 8, 2)),
        DKV: ((64, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2), (32, 128, 4, 3),
              (64, 128, 8, 2)),
    },
    128: {
        FORWARD: ((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 4, 3), (64, 128, 4, 2),
                  (64, 64, 4, 2), (128, 32, 4, 3)),
        DQ: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (128, 32, 8, 3),
             (64, 32, 4, 3)),
        DKV: ((64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 3), (32, 128, 8, 3),
              (32, 64, 4, 3), (128, 64, 8, 2)),
    },
    256: {
        FORWARD: ((64, 32, 4, 3), (128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2), (128, 64, 8, 2)),
        DQ: ((64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 4, 2), (64, 64, 8, 2)),
        DKV: ((64, 64, 4, 2), (32, 32, 8, 1), (32, 32, 8, 2), (32, 64, 8, 1), (32, 64, 8, 2)),
    },
}  # fmt: skip


def _attention() -> Iterable[Question]:
    for size, kernels in _ATTENTION.items():
        trees = _TREES if size < 256 else _TREES[:1]
        for kernel, rows in kernels.items():
            cases = tuple(
                attention.tree_attention(kernel, tree, _HEADS[size], BF16, warm=tree == _TREES[-1]) for tree in trees
            )
            yield Question(
                kernel, cases, _options(_tiles("BLOCK_Q", "BLOCK_K"), rows),
                at_least={"head_dim": _NARROWER[size]}, at_most={"head_dim": size, "extras": 0},
            )  # fmt: skip


def _decode() -> Iterable[Question]:
    tiles = ((64, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 3), (16, 128, 4, 2), (32, 64, 4, 2), (32, 128, 4, 2),
             (16, 32, 4, 3), (16, 64, 2, 3), (64, 64, 4, 3))  # fmt: skip
    rows = [(*tile, programs) for tile, programs in product(tiles, (264, 528))]
    for size in (64, 128):
        cases = tuple(attention.decode_attention(n, 512, 256, _HEADS[size], BF16) for n in (1, 32, 256))
        yield Question(
            "decode_attention", cases, _options((*_tiles("BLOCK_Q", "BLOCK_K"), "PROGRAMS"), rows),
            at_least={"head_dim": _NARROWER[size]}, at_most={"head_dim": size},
        )  # fmt: skip


_MATRICES = ((17_920, 1536), (1536, 8960), (37_888, 3584))


def _quantized() -> Iterable[Question]:
    tiles = ((64, 4, 4), (64, 4, 2), (64, 2, 4), (32, 2, 4), (128, 4, 4), (128, 8, 3), (64, 4, 6), (32, 4, 4))
    keys = ("BLOCK_N", "num_warps", "num_stages", "PROGRAMS", "BLOCK_M", "BLOCK_K")
    for backward in (False, True):
        kernel = "quantized_linear_backward" if backward else "quantized_linear"
        for fewest, most, block, counts in ((1, 16, 16, (1, 16)), (17, 64, 64, (64,))):
            rows = [(*tile, programs, block, 32) for tile, programs in product(tiles, (264, 528, 1056))]
            cases = tuple(
                products.quantized_linear(count, *matrix, BF16, "int4", backward)
                for matrix in _MATRICES for count in counts
            )  # fmt: skip
            yield Question(kernel, cases, _options(keys, rows), at_least={"rows": fewest}, at_most={"rows": most})
    cases = tuple(products.quantized_linear(count, *_MATRICES[1], BF16, reduce=True) for count in (1, 16))
    adding = [(block, warps, 1) for block, warps in product((128, 256, 512, 1024), (1, 2, 4))]
    yield Question("quantized_linear_reduce", cases, _options(_tiles("BLOCK"), adding), bytes=(4,))
    cases = tuple(products.dequantize(*matrix, BF16, form) for matrix in _MATRICES for form in products.FORMS)
    copying = [(n, k, warps, 1) for n, k, warps in product((8, 16, 32, 64), (128, 256), (4, 8))]
    yield Question("dequantize", cases, _options(_tiles("BLOCK_N", "BLOCK_K"), copying))


def _loss() -> Iterable[Question]:
    cases = tuple(products.softmax_loss(rows, 151_936, BF16) for rows in (441, 64))
    rows = (
        (8192, 132, 32),
        (4096, 72, 8),
        (8192, 72, 16),
        (8192, 72, 8),
        (4096, 132, 8),
        (8192, 132, 16),
        (16_384, 72, 32),
        (16_384, 132, 32),
        (4096, 264, 8),
        (4096, 264, 16),
        (2048, 264, 4),
        (2048, 528, 4),
    )
    keys = ("BLOCK", "PROGRAMS", "num_warps", "num_stages")
    yield Question(
        "softmax_loss", cases, _options(keys, ((*row, 1) for row in rows)), bytes=(4,), at_least={"width": 65_536}
    )


def _rows() -> Iterable[Question]:
    heads = ((12, 2, 128), (28, 4, 128))
    for backward in (False, True):
        end = "_backward" if backward else ""
        rows = ((block, warps, 1) for block, warps in product((4, 8, 16, 32), (1, 2, 4)))
        yield Question(
            "rope" + end, tuple(rowwise.rope(TOKENS, of, BF16, backward) for of in heads),
            _options(_tiles("BLOCK_H"), rows), at_least={"head_dim": 65}, at_most={"head_dim": 128},
        )  # fmt: skip
        rows = ((block, warps, 1) for block, warps in product((512, 1024, 2048, 4096), (4, 8)))
        yield Question(
            "swiglu" + end, tuple(rowwise.swiglu(TOKENS, width, BF16, backward) for width in (8960, 18_944)),
            _options(_tiles("BLOCK"), rows),
        )  # fmt: skip
        for width, block in ((1536, 2048), (3584, 4096)):
            yield Question(
                "rms_norm" + end, (rowwise.rms_norm(TOKENS, width, BF16, backward),),
                _options(_tiles("BLOCK"), ((block, warps, 1) for warps in (1, 2, 4, 8, 16))),
                at_least={"width": block // 2 + 1}, at_most={"width": block},
            )  # fmt: skip
        sizes = (128, 256, 512) if backward else (512, 1024, 2048)
        rows = ((block, warps, 1) for block, warps in product(sizes, (1, 2, 4, 8)))
        yield Question(
            "embed" + end, tuple(rowwise.embed(TOKENS, 64, width, BF16, backward) for width in (1536, 3584)),
            _options(_tiles("BLOCK"), rows),
        )  # fmt: skip
    for count, width, block in ((32, 1536, 2048), (256, 3584, 4096)):
        yield Question(
            "prompt_step", (rowwise.prompt_step(count, width),),
            _options(_tiles("BLOCK"), ((block, warps, 1) for warps in (2, 4, 8, 16))),
            bytes=(4,), at_least={"width": block // 2 + 1}, at_most={"width": block},
        )  # fmt: skip


def questions() -> list[Question]:
    """Every question, those with the most to gain first."""
    return [*_attention(), *_quantized(), *_loss(), *_decode(), *_rows()]
