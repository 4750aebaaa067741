"""What a launcher would launch: its Triton kernels with signature, constants, grid and arguments, without a GPU.

Inside `intercepted(arch, handle)` a call `kernel[grid](...)` is specialised as Triton's run-time would specialise it
for that architecture (pointer alignment, integers divisible by 16, ones), and goes to `handle` instead of running. So
what is compiled ahead of time is what the launcher starts. TRITON_INTERPRET must not be set: it decides at import what
`triton.jit` makes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from embedgrad.kernels import launch as launch_parameters
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel, specialised for one architecture."""

    arch: str
    kernel: Any  # a JITFunction
    signature: dict[str, str]  # parameter -> Triton type or "constexpr"
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # parameter -> what the launcher passed

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).lstrip("_")

    @property
    def blocks(self) -> dict[str, int]:
        """The integer constants, such as block sizes."""
        constant = {p.name for p in self.kernel.params if p.is_constexpr}
        return {k: v for k, v in self.arguments.items() if k in constant and type(v) is int}

    def compile(self) -> Any:
        """The kernel compiled for `arch` (through Triton's cache)."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=TARGETS[self.arch], options=self.options)


def _specialised(
    kernel: Any, arch: str, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any], extra: dict[str, Any]
) -> Launch:
    backend = make_backend(TARGETS[arch])
    kwargs = {"debug": False, **kwargs, **extra}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    parsed, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    grid = tuple(grid(bound)) if callable(grid) else tuple(grid)
    options = dict(parsed.__dict__)
    return Launch(arch, kernel, signature, constants, attributes, options, (*grid, 1, 1)[:3], dict(bound))


@contextmanager
def intercepted(arch: str, handle: Callable[[Launch], None], **extra: Any) -> Iterator[None]:
    """Inside, every `kernel[grid](...)` goes to `handle`. extra: compiler options added to each launch."""
    if launch_parameters.interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: Triton interprets kernels in this process and compiles none")
    own = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        handle(_specialised(self, arch, args, grid, kwargs, extra))

    JITFunction.run = run
    try:
        with launch_parameters.pretending(arch):
            yield
    finally:
        JITFunction.run = own


def captured(run: Callable[[], object], arch: str) -> list[Launch]:
    """The launches that `run()` makes on `arch`, in their order; no kernel runs."""
    launches: list[Launch] = []
    with intercepted(arch, launches.append):
        run()
    return launches
