"""One case under given launch parameters: right, wrong, or not to be run.

Right means: every element is written, two runs give equal bits, and by the three-way rule the error against the float64
truth is at most twice that of plain torch in the same type, plus TOLERANCE. All of it must hold with the stages of the
parameters and with one stage. The error is taken as the norm over all elements and as the largest one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embedgrad.backends.launch_check.case import Case, Tensors
from embedgrad.kernels import launch
from embedgrad.util.shown import first_line

FACTOR = 2.0
"""As flash-attention's tests allow: P and dS are rounded where plain torch keeps float32."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place of 16 bits; for float32 what sums of thousands of terms in another order may differ by.
A tile that is wrong is off by more than 1e-3."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DeviceLost(Exception):
    """An error after which nothing runs on the device in this process."""


@dataclass(frozen=True)
class Verdict:
    """What the check of one case has found. error, allowed: of the output whose ratio of the two is largest."""

    kernel: str
    text: str
    options: dict[str, int]
    fault: str | None = None
    error: float = 0.0
    allowed: float = 0.0

    @property
    def right(self) -> bool:
        return self.fault is None


class Checked:
    """A case on a device, whose inputs, plain result and truth are made once for all launch parameters."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.given = case.inputs(device)
        self._expected: tuple[Tensors, Tensors] | None = None

    def expected(self) -> tuple[Tensors, Tensors]:
        """(plain torch in the case's own types, the float64 truth)."""
        if self._expected is None:
            found = []
            for given in (self.given, {name: _double(x) for name, x in self.given.items()}):
                out = self.case.fresh(given)
                self.case.plain(given, out)
                found.append(out)
            self._expected = found[0], found[1]
        return self._expected

    def result(self) -> Tensors:
        """What the kernel gives in fresh outputs."""
        out = self.case.fresh(self.given)
        self.case.run(self.given, out)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.case.read(out)

    def verdict(self, options: launch.Options) -> Verdict:
        """Checks the case under `options`. Raises DeviceLost where the device cannot be used any more."""
        verdict = Verdict(self.case.kernel, self.case.text, dict(options))
        stages = options["num_stages"]
        for count in sorted({1, stages}):
            with launch.overridden(self.case.kernel, **{**options, "num_stages": count}):
                found = self._fault(verdict)
            if found.fault is not None:
                return replace(found, fault=f"with {count} stage{'s' * (count > 1)} {found.fault}")
            verdict = found
        return verdict

    def _fault(self, verdict: Verdict) -> Verdict:
        try:
            first, second = self.result(), self.result()
        except Exception as error:
            if is_lost(error):
                raise DeviceLost(f"{self.case.kernel} with {verdict.options}: {named_error(error)}") from error
            return replace(verdict, fault=f"it cannot be run: {named_error(error)}")
        differing = [name for name in first if not equal_bits(first[name], second[name])]
        if differing:
            return replace(verdict, fault=f"two runs give {differing[0]} with different bits")
        plain, truth = self.expected()
        for name, x in first.items():
            fault, off, allowed = compared(x, plain[name], truth[name])
            if fault is not None:
                return replace(verdict, fault=f"{name} {fault}", error=off, allowed=allowed)
            if not verdict.allowed or off / allowed > verdict.error / verdict.allowed:
                verdict = replace(verdict, error=off, allowed=allowed)
        return verdict


def compared(kernel: Tensor, plain: Tensor, truth: Tensor) -> tuple[str | None, float, float]:
    """(what is wrong or None, error, allowed), both relative to the truth, by norm or by the largest element."""
    tolerance = TOLERANCE[kernel.dtype] if kernel.is_floating_point() else 0.0
    kernel, plain, truth = (x.detach().double() for x in (kernel, plain, truth))
    missing = int(kernel.isnan().sum())
    if missing:
        return f"has {missing} of {kernel.numel()} elements that are not written or NaN", float("inf"), tolerance
    infinite = truth.isinf()
    if bool(infinite.any()):
        if not torch.equal(kernel[infinite], truth[infinite]):
            return "misses infinite elements of the reference", float("inf"), tolerance
        kernel, plain, truth = (torch.where(infinite, 0.0, x) for x in (kernel, plain, truth))
    worst = 0.0, 1.0
    for measure in (torch.linalg.vector_norm, _largest):
        size = float(measure(truth)) or 1.0
        error = float(measure(kernel - truth)) / size
        allowed = FACTOR * float(measure(plain - truth)) / size + tolerance
        if not error <= allowed:
            return f"is off by {error:.1e} of the reference, where {allowed:.1e} is allowed", error, allowed
        if allowed and error / allowed > worst[0] / worst[1]:
            worst = error, allowed
    return None, *worst


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and type are equal bit for bit."""
    kind = _BITS[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def _largest(x: Tensor) -> Tensor:
    return x.abs().max() if x.numel() else x.new_zeros(())


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def named_error(error: BaseException) -> str:
    """An error in one line, behind the name of its type."""
    return f"{type(error).__name__}: {first_line(error)}"


def is_lost(error: BaseException) -> bool:
    """Whether the device is lost: after an illegal access every call of the CUDA runtime fails with the same error."""
    text = str(error).lower()
    return any(sign in text for sign in ("illegal memory access", "device-side assert", "misaligned address",
                                         "illegal instruction", "unspecified launch failure"))  # fmt: skip
