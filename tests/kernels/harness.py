"""What every kernel test needs: guarded memory, the three-way rule, grid orders, awkward layouts.

Where the kernels run: in Triton's interpreter on the CPU (the default, TRITON_INTERPRET=1 is set by conftest.py), or
on a GPU with TRITON_INTERPRET=0. Make tensors on `DEVICE`; the helpers below do.

A test in full::

    @given(st.integers(0, 2**31), awkward_sizes(1, 40), awkward_sizes(1, 70), layouts())
    def test_scale(seed, rows, width, layout):
        x = laid_out(normal(seed, (rows, width), torch.float16), layout)  # guarded, same values, awkward strides

        def run():
            out = guarded((rows, width), torch.float16)  # NaN everywhere, canaries before and after
            scale(x, 3.0, out=out)
            return out

        out = same_bits(run)  # two runs, and the grid forwards, backwards, shuffled: equal bits; all elements written
        three_way(out, x * 3.0, x.double() * 3.0)
        check_canaries()  # also done by a fixture when the test ends; here it names the drawn example

Values: `normal(seed, shape, dtype, scale=1.0)`. Sizes: `awkward_sizes(low, high)` (1, primes, powers of two ± 1).
Layouts: `layouts()` draws one of LAYOUTS; `laid_out(x, layout)` copies x into guarded memory with it. "expanded"
repeats one row with stride 0 (and so changes the values: use what it returns).
Outputs: `guarded(shape, dtype, strides=..., fill=...)`; an output is poisoned (NaN; a sentinel in integer types) and
`assert_written(out)` says whether every element was stored. Elements between the strides are canaries, too.
Comparison: `three_way(kernel, plain, truth, tolerance=..., factor=..., by="norm" | "max" | "element")`.
Determinism: `same_bits(run)`, `grid_order("backwards")`, `equal_bits(a, b)`.
Launch parameters of a test: `embedgrad.kernels.launch.overridden(kernel, BLOCK=16)` (small blocks give several blocks
on small shapes, which is quick in the interpreter).

The interpreter is not a GPU: bf16 `tl.dot` is wrong there and casts to bf16 truncate, so draw the types of a test from
FLOAT_TYPES (fp32, fp16, and bf16 only on a GPU); bf16 is covered by the executed machine code (test_executed_cdna3.py).
"""

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hypothesis import strategies as st

Shape = Sequence[int]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "1") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda:0")
FLOAT_TYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)

# Half a unit in the last place of the output's type: rounding the truth itself costs as much.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# Quiet NaNs with a payload of their own (reading one poisons the result, and storing a NaN over one shows), and
# for integers a number that is no index of a small test.
_CANARY_BITS = {1: 0x5A, 2: 0x7FDA, 4: 0x7FDADADA, 8: 0x7FFADADADADADADA}
_CANARY_INTEGER = 23130
INTEGER_POISON = -23131
_BITS_TYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MARGIN_BYTES = 512


@dataclass
class _Guard:
    name: str
    buffer: torch.Tensor  # flat, with margins, as integers
    untouched: torch.Tensor  # flat bool: elements that no view element covers
    canary: int


_guards: list[_Guard] = []


def forget_guards() -> None:
    """Drop all guards without checking them (the fixture in conftest.py does this before each test)."""
    _guards.clear()


def check_canaries() -> None:
    """Raise AssertionError when anything outside a guarded tensor's elements has changed; then forget the guards."""
    guards, _guards[:] = list(_guards), []
    for guard in guards:
        changed = (guard.buffer != guard.canary) & guard.untouched
        if changed.any():
            at = changed.nonzero().flatten().tolist()
            raise AssertionError(
                f"{len(at)} elements outside {guard.name} were overwritten; "
                f"in elements of the buffer {at[:8]}, of {guard.buffer.numel()}"
            )


def _canary(dtype: torch.dtype) -> int:
    size = dtype.itemsize
    return _CANARY_BITS[size] if dtype.is_floating_point or size == 1 else _CANARY_INTEGER


def _contiguous_strides(shape: Shape) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def guarded(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    *,
    strides: Shape | None = None,
    fill: float | torch.Tensor | None = None,
    name: str = "a guarded tensor",
    device: torch.device | None = None,
) -> torch.Tensor:
    """A tensor between canaries: poisoned by default (NaN, or INTEGER_POISON), else filled with a number or a tensor.

    strides: in elements; zero strides share elements; elements that no index reaches are canaries as well.
    """
    shape = tuple(shape)
    strides = _contiguous_strides(shape) if strides is None else tuple(strides)
    empty = 0 in shape
    span = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    margin = _MARGIN_BYTES // dtype.itemsize
    bits = torch.empty(span + 2 * margin, dtype=_BITS_TYPE[dtype.itemsize], device=device or DEVICE)
    canary = _canary(dtype)
    bits.fill_(canary)
    untouched = torch.ones_like(bits, dtype=torch.bool)
    view = bits.view(dtype).as_strided(shape, strides, margin)
    if not empty:
        untouched.as_strided(shape, strides, margin).fill_(False)
        if isinstance(fill, torch.Tensor):
            # Through unexpanded dimensions only: copy_ refuses a target whose elements share memory.
            own = tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)
            view[own].copy_(fill.expand(shape)[own])
        else:
            poison = math.nan if dtype.is_floating_point else (0x5B if dtype.itemsize == 1 else INTEGER_POISON)
            untouched_value: Any = poison if fill is None else fill
            own = tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)
            view[own].fill_(untouched_value)
    _guards.append(_Guard(f"{name} {list(shape)} {dtype} strides {list(strides)}", bits, untouched, canary))
    return view


def guarded_copy(x: torch.Tensor, *, name: str = "a guarded tensor") -> torch.Tensor:
    """The same values, shape, type and strides between canaries."""
    return guarded(x.shape, x.dtype, strides=x.stride(), fill=x, name=name)


def assert_written(*outputs: torch.Tensor) -> None:
    """Raise AssertionError when an output still holds poison somewhere."""
    for out in outputs:
        left = out.isnan() if out.dtype.is_floating_point else out == INTEGER_POISON
        if left.any():
            at = left.nonzero()[:4].tolist()
            raise AssertionError(f"{int(left.sum())} of {out.numel()} elements were never written (or are NaN): {at}")


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape and type are equal bit for bit (NaN equals the same NaN, 0 is not -0)."""
    kind = _BITS_TYPE[a.dtype.itemsize]
    return (
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
    )


def three_way(
    kernel: torch.Tensor,
    plain: torch.Tensor,
    truth: torch.Tensor,
    *,
    tolerance: float | None = None,
    factor: float = 1.0,
    by: Literal["norm", "max", "element"] = "norm",
    what: str = "output",
) -> None:
    """|kernel − truth| ≤ factor · |plain − truth| + tolerance · |truth|, else AssertionError with the figures.

    kernel: what the kernel under test gave; plain: plain PyTorch in the kernel's own type; truth: the fp64 reference.
    by: "norm" compares 2-norms over the whole tensor; "max" the largest errors, with the tolerance relative to the
    largest truth; "element" each element with the tolerance relative to the truth's root mean square.
    tolerance: TOLERANCE[kernel.dtype] unless given. Infinite elements of the truth must be met exactly.
    Elements that overflow in the kernel as they do in plain PyTorch do not count.
    Rule: Wijmans et al., Cut Your Losses (arXiv 2411.09009), tests; Dao, flash-attention, tests (factor 2).
    """
    if not 1.0 <= factor <= 2.0:
        raise ValueError(f"factor {factor} is outside 1 to 2")
    tolerance = TOLERANCE[kernel.dtype] if tolerance is None else tolerance
    kernel, plain, truth = (x.detach().double().cpu() for x in (kernel, plain, truth))
    if not kernel.shape == plain.shape == truth.shape:
        raise AssertionError(f"{what}: shapes {list(kernel.shape)}, {list(plain.shape)}, {list(truth.shape)}")
    if not truth.numel():
        return
    if truth.isnan().any():
        raise AssertionError(f"{what}: the truth itself has NaN")
    if kernel.isnan().any():
        raise AssertionError(f"{what}: {int(kernel.isnan().sum())} of {kernel.numel()} elements are NaN")
    infinite = truth.isinf()
    if not torch.equal(kernel[infinite], truth[infinite]):
        raise AssertionError(f"{what}: infinite elements of the truth are not met")
    finite = ~infinite & ~(kernel.isinf() & (kernel == plain))
    error, allowed = (kernel - truth)[finite].abs(), (plain - truth)[finite].abs()
    size = truth[finite].abs()
    if not error.numel():
        return
    if by == "norm":
        error, allowed, size = (x.norm() for x in (error, allowed, size))
    elif by == "max":
        error, allowed, size = (x.max() for x in (error, allowed, size))
    else:
        size = size.square().mean().sqrt()
    bound = factor * allowed.nan_to_num(nan=0.0, posinf=0.0) + tolerance * size
    excess = (error - bound).reshape(-1)
    if not (error <= bound).all():
        worst = int(excess.argmax())
        e, b = error.reshape(-1)[worst], bound.reshape(-1)[worst]
        raise AssertionError(
            f"{what} ({by}): error {e:.3e} exceeds {b:.3e} = {factor} x plain torch's "
            f"+ {tolerance:.1e} x {float(size):.3e}; {int((excess > 0).sum())} of {excess.numel()} comparisons"
        )


GridOrder = Literal["forwards", "backwards", "shuffled"]
GRID_ORDERS: tuple[GridOrder, ...] = ("forwards", "backwards", "shuffled")


@contextmanager
def grid_order(order: GridOrder, seed: int = 0) -> Iterator[None]:
    """Launches inside walk their grid in this order. Triton's interpreter only: on a GPU this changes nothing.

    The interpreter's loop counts x, y, z upwards and names each program by set_grid_idx; the programs are renumbered
    there, so every program still runs exactly once.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    own_dim, own_idx = builder.set_grid_dim, builder.set_grid_idx
    numbers: list[int] = []

    def set_grid_dim(nx: int, ny: int, nz: int) -> None:
        own_dim(nx, ny, nz)
        numbers[:] = range(nx * ny * nz)
        if order == "backwards":
            numbers.reverse()
        elif order == "shuffled":
            random.Random(seed).shuffle(numbers)

    def set_grid_idx(x: int, y: int, z: int) -> None:
        _, ny, nz = builder.grid_dim
        number = numbers[(x * ny + y) * nz + z]
        own_idx(number // (ny * nz), number // nz % ny, number % nz)

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield
    finally:
        builder.set_grid_dim, builder.set_grid_idx = own_dim, own_idx


def grid_orders() -> Iterator[GridOrder]:
    """`for order in grid_orders(): run()` — the body's launches walk their grid in that order."""
    for order in GRID_ORDERS:
        with grid_order(order):
            yield order


def same_bits(run: Callable[[], Any], *, written: bool = True) -> Any:
    """The result of `run()` (a tensor or a sequence of tensors), after checking that it does not depend on chance.

    Runs twice forwards, once backwards, once shuffled; every result must have the same bits. `run` makes its outputs
    anew each time. written: also check that no poison is left.
    """
    first = run()
    expected = (first,) if isinstance(first, torch.Tensor) else tuple(first)
    if written:
        assert_written(*expected)
    for order in GRID_ORDERS:
        with grid_order(order, seed=1):
            again = run()
        found = (again,) if isinstance(again, torch.Tensor) else tuple(again)
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            if not equal_bits(a, b):
                raise AssertionError(f"output {i} differs from the first run's in a second run, grid {order}")
    return first


def normal(seed: int, shape: Shape, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Normally distributed values on DEVICE, the same for the same seed; not guarded (see laid_out)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
    return (x * scale).to(dtype).to(DEVICE)


Layout = Literal["contiguous", "wide_rows", "stepped", "transposed", "expanded"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "wide_rows", "stepped", "transposed", "expanded")


def layouts(*, inner_contiguous: bool = False, expanded: bool = True) -> st.SearchStrategy[Layout]:
    """A hypothesis strategy of layouts. inner_contiguous: only those whose last stride is 1 (weights, outputs)."""
    wanted = [
        layout
        for layout in LAYOUTS
        if (expanded or layout != "expanded") and not (inner_contiguous and layout in ("stepped", "transposed"))
    ]
    return st.sampled_from(wanted)


def strides_of(shape: Shape, layout: Layout) -> tuple[int, ...]:
    """Strides in elements: rows with gaps, every third element, the first two dimensions swapped, row 0 repeated."""
    shape = tuple(shape)
    if layout == "wide_rows" and shape:
        return (*_contiguous_strides((*shape[:-1], shape[-1] + 5))[:-1], 1)
    if layout == "stepped":
        return tuple(3 * s for s in _contiguous_strides(shape))
    if layout == "transposed" and len(shape) > 1:
        swapped = _contiguous_strides((shape[1], shape[0], *shape[2:]))
        return (swapped[1], swapped[0], *swapped[2:])
    if layout == "expanded" and shape:
        return (0, *_contiguous_strides(shape)[1:])
    return _contiguous_strides(shape)


def laid_out(x: torch.Tensor, layout: Layout, *, name: str = "an input") -> torch.Tensor:
    """x's values (with "expanded": its first row's, repeated) in guarded memory with the layout's strides."""
    return guarded(x.shape, x.dtype, strides=strides_of(x.shape, layout), fill=x, name=name)


def awkward_sizes(low: int, high: int) -> st.SearchStrategy[int]:
    """Sizes from low to high: any, with more weight on 1, primes, and powers of two and their neighbours."""
    primes = [n for n in range(2, high + 1) if all(n % p for p in range(2, math.isqrt(n) + 1))]
    powers = [2**i + j for i in range(12) for j in (-1, 0, 1)]
    special = sorted({n for n in (1, *primes, *powers) if low <= n <= high})
    whole = st.integers(low, high)
    return st.one_of(st.sampled_from(special), whole) if special else whole
