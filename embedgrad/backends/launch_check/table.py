"""Every set of launch parameters that an architecture gets, checked: the table's rows, and the heuristic elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from embedgrad.backends.launch_check import attention, products, rowwise
from embedgrad.backends.launch_check.case import Case
from embedgrad.backends.launch_check.check import Checked, DeviceLost, Verdict
from embedgrad.backends.launch_check.compiled import compile_all
from embedgrad.kernels import launch
from embedgrad.kernels.launch_row import Row
from embedgrad.kernels.launch_table import ROWS

SECONDS = 55.0
"""Seconds for all checks. What is not checked by then is reported as unchecked."""
COMPILE_SHARE = 0.7
"""Share of SECONDS for compiling in parallel. What is not compiled by then compiles when it is checked."""


@dataclass(frozen=True)
class Scale:
    """How large the cases are. tree, heads (H, G): of attention. tokens, width: of rows. matrix: of quantised weights.
    vocabulary, targets: of the loss. rows: of the prompt. decode: sequences, prefix keys, own keys."""

    tree: attention.Tree
    heads: tuple[int, int]
    tokens: int
    width: int
    matrix: tuple[int, int]
    vocabulary: int
    targets: int
    rows: int
    decode: tuple[int, int, int]


REAL = Scale((512, 112, 16), (16, 4), 1024, 1536, (4000, 1536), 151_936, 64, 32, (8, 512, 256))
"""More programs than multiprocessors, and loops longer than any pipeline."""
TINY = Scale((9, 7, 3), (4, 2), 3, 70, (40, 128), 700, 3, 3, (3, 17, 9))


class _Limits:
    """The sizes of a row's case: those wished for, kept within the row's limits."""

    def __init__(self, row: Row | None) -> None:
        self._most: dict[str, int] = {} if row is None else row.at_most
        self._least: dict[str, int] = {} if row is None else row.at_least

    def size(self, name: str, wished: int) -> int:
        return max(min(wished, self._most.get(name, wished)), self._least.get(name, 0))


Maker = Callable[[_Limits, torch.dtype, Scale], Iterator[Case]]


def _attention(kernel: str) -> Maker:
    def make(limits: _Limits, dtype: torch.dtype, scale: Scale) -> Iterator[Case]:
        heads = (*scale.heads, limits.size("head_dim", 256))
        for extras in (0, 2):
            yield attention.tree_attention(kernel, scale.tree, heads, dtype, extras=extras)

    return make


def _decode(limits: _Limits, dtype: torch.dtype, scale: Scale) -> Iterator[Case]:
    yield attention.decode_attention(*scale.decode, (*scale.heads, limits.size("head_dim", 256)), dtype)


def _rope(backward: bool) -> Maker:
    def make(limits: _Limits, dtype: torch.dtype, scale: Scale) -> Iterator[Case]:
        heads = (*scale.heads, limits.size("head_dim", 128))
        yield rowwise.rope(scale.tokens, heads, dtype, backward)

    return make


def _rows(function: Callable[[int, int, torch.dtype, bool], Case], backward: bool) -> Maker:
    def make(limits: _Limits, dtype: torch.dtype, scale: Scale) -> Iterator[Case]:
        yield function(scale.tokens, limits.size("width", scale.width), dtype, backward)

    return make


def _embed(backward: bool) -> Maker:
    def make(limits: _Limits, dtype: torch.dtype, scale: Scale) -> Iterator[Case]:
        yield rowwise.embed(scale.tokens + 1, scale.rows, limits.size("width", scale.width), dtype, backward)

    return make


def _prompt_step(limits: _Limits, dtype: torch.dtype, scale: Scale) -> Iterator[Case]:
    yield rowwise.prompt_step(scale.rows, limits.size("width", scale.width))


def _softmax_loss(limits: _Limits, dtype: torch.dtype, scale: Scale) -> Iterator[Case]:
    gradient = torch.float32 if dtype == torch.float16 else dtype
    yield products.softmax_loss(scale.targets, limits.size("width", scale.vocabulary), gradient)


def _dequantize(limits: _Limits, dtype: torch.dtype, scale: Scale) -> Iterator[Case]:
    for form in products.FORMS:
        yield products.dequantize(*scale.matrix, dtype, form)


def _quantized(backward: bool) -> Maker:
    def make(limits: _Limits, dtype: torch.dtype, scale: Scale) -> Iterator[Case]:
        for form in products.FORMS:
            yield products.quantized_linear(limits.size("rows", 64), *scale.matrix, dtype, form, backward)

    return make


def _reduce(limits: _Limits, dtype: torch.dtype, scale: Scale) -> Iterator[Case]:
    yield products.quantized_linear(1, *scale.matrix, dtype, reduce=True)


KERNELS: dict[str, Maker] = {
    **{name: _attention(name) for name in (attention.FORWARD, attention.DQ, attention.DKV)},
    "decode_attention": _decode,
    "softmax_loss": _softmax_loss,
    "dequantize": _dequantize,
    "quantized_linear": _quantized(False),
    "quantized_linear_backward": _quantized(True),
    "quantized_linear_reduce": _reduce,
    "rms_norm": _rows(rowwise.rms_norm, False),
    "rms_norm_backward": _rows(rowwise.rms_norm, True),
    "rope": _rope(False),
    "rope_backward": _rope(True),
    "swiglu": _rows(rowwise.swiglu, False),
    "swiglu_backward": _rows(rowwise.swiglu, True),
    "embed": _embed(False),
    "embed_backward": _embed(True),
    "prompt_step": _prompt_step,
}
"""Every kernel that asks the launch table, and its cases."""


@dataclass(frozen=True)
class Subject:
    """A row of the table (None: the heuristic) for one kernel, and what it is checked on."""

    kernel: str
    row: Row | None
    cases: tuple[Case, ...]

    @property
    def name(self) -> str:
        """The row in words: the kernel, and what it is for."""
        if self.row is None:
            return f"{self.kernel}, the heuristic"
        limits = [f"{name} ≥ {least}" for name, least in self.row.at_least.items()]
        limits += [f"{name} ≤ {most}" for name, most in self.row.at_most.items()]
        types = [f"{size}-byte elements" for size in self.row.bytes]
        return ", ".join([f"{self.kernel}, the row for {self.row.arch}", *types, *limits])


@dataclass(frozen=True)
class Outcome:
    """What became of a subject. verdict: the first that is not right, else the last; None: not checked, see `why`."""

    subject: Subject
    verdict: Verdict | None
    why: str = ""

    @property
    def trusted(self) -> bool:
        return self.verdict is None or self.verdict.right


def subjects(
    arch: str, rows: Sequence[Row] = ROWS, *, half: torch.dtype = torch.bfloat16, scale: Scale = REAL
) -> list[Subject]:
    """What an architecture gets, in the table's order: each row for each kernel that reaches it, and the heuristic.

    half: the type that stands for elements of two bytes. A row that others hide is left out.
    """
    found = []
    for row in (*rows, None):
        if row is not None and not fnmatchcase(arch, row.arch):
            continue
        for kernel, make in KERNELS.items():
            if row is not None and not fnmatchcase(kernel, row.kernel):
                continue
            made = [case for dtype in _types(row, half) for case in make(_Limits(row), dtype, scale)]
            reached = {case.text: case for case in made if _used(kernel, arch, case) is row}
            # A window and a softcap only where the row cannot be reached without.
            plain = {text: case for text, case in reached.items() if not case.sizes.get("extras")}
            if reached:
                found.append(Subject(kernel, row, tuple((plain or reached).values())))
    return found


def _types(row: Row | None, half: torch.dtype) -> tuple[torch.dtype, ...]:
    if row is None:
        return (half, torch.float32)
    if not row.bytes:
        return (half,)
    return tuple({2: half, 4: torch.float32}[size] for size in row.bytes if size in (2, 4))


def _used(kernel: str, arch: str, case: Case) -> Row | None:
    with launch.observed() as used:
        launch.options(kernel, arch, dtype=case.dtype, **case.sizes)
    return used[-1][1]


def check(
    found: Sequence[Subject], device: torch.device, *, seconds: float = SECONDS, told: Callable[[str], None] = print
) -> list[Outcome]:
    """Checks each subject on a device, after all were compiled in parallel. told: takes lines about the progress."""
    started = time.monotonic()
    until = started + seconds
    prepared = [(subject, [Checked(case, device) for case in subject.cases]) for subject in found]
    calls = [
        (one, {**options, "num_stages": stages})
        for _, checked in prepared
        for one in checked
        for options in (one.case.options(device),)
        for stages in sorted({1, options["num_stages"]})
    ]
    told(f"compiling {len(calls)} calls of {len(found)} launch rows for {launch.architecture(device)}")
    compile_all(calls, device, until=started + COMPILE_SHARE * seconds)
    outcomes: list[Outcome] = []
    lost = ""
    for subject, checked in prepared:
        if lost or time.monotonic() > until:
            outcomes.append(Outcome(subject, None, lost or f"not checked: {seconds:.0f} seconds were over"))
            continue
        try:
            outcomes.append(Outcome(subject, _verdict(checked, device)))
        except DeviceLost as error:
            case = subject.cases[0]
            fault = f"the device was lost: {error}"
            outcomes.append(Outcome(subject, Verdict(subject.kernel, case.text, dict(case.options(device)), fault)))
            lost = "not checked: the device was lost before"
    return outcomes


def _verdict(checked: Sequence[Checked], device: torch.device) -> Verdict:
    for one in checked:
        verdict = one.verdict(one.case.options(device))
        if not verdict.right:
            break
    return verdict
