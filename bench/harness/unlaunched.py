"""A model without memory whose kernels are never launched: what is left of a step is what the host does for it.

The weights lie on `meta`. A recorder takes every launch of ours and keeps it from happening. torch's matrix products
and row picks do not happen either while time is measured, because on `meta` torch does them in Python, which a GPU's
dispatch does not. So Triton's own launcher, cuBLAS and the driver are not in the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from embedgrad.kernels import launch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness.models import random_model
from bench.harness.stopwatch import replaced
from embedgrad.backends.triton import Triton
from embedgrad.engine import packed_pass
from embedgrad.engine.model import Model
from embedgrad.model.config import ModelConfig
from embedgrad.util.host import Parcel

META = torch.device("meta")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear")
IN_PYTHON = ("mm", "addmm", "index_select")  # torch's ways on `meta` that no GPU takes
NO_LAUNCH = ("empty", "detach", "alias", "sym_")  # operations that are no view and start nothing on a device


def model_without_memory(config: ModelConfig, name: str) -> Model:
    """A bfloat16 model of the backend triton on `meta`."""
    model = random_model(config, name, META, torch.bfloat16, Triton(), "compute")
    # What it would read is nowhere; a prompt begins with zeros.
    vars(model)["embedding_rows"] = lambda ids: torch.zeros(len(ids), config.hidden_size)
    return model


@contextmanager
def launches(arch: str) -> Iterator[Counter[str]]:
    """Inside, every device counts as `arch` and no kernel of ours is launched; how often each would have been."""
    found: Counter[str] = Counter()

    def note(one: launch.Launch) -> bool:
        found[kernel_name(one[0])] += 1
        return False

    with launch.pretending(arch), launch.recorded(note), replaced(packed_pass, "send_together", _sent_together):
        yield found


def _sent_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """`embedgrad.util.host.send_together` as it goes for a GPU: one copy."""
    parcel = Parcel(tensors)
    buffer = parcel.fill(torch.empty(parcel.nbytes, dtype=torch.uint8), tensors)
    return parcel.views(buffer.to(device))


def kernel_name(kernel: Any) -> str:
    """The name of a kernel, compiled or interpreted."""
    return str(getattr(kernel, "__name__", None) or kernel.fn.__name__).strip("_").removesuffix("_kernel")


@contextmanager
def nothing_computed() -> Iterator[None]:
    """Inside, torch's products and row picks with an `out` return it as it is."""

    def skipped(*args: Any, out: Tensor, **kwargs: Any) -> Tensor:
        return out

    with ExitStack() as stack:
        for name in IN_PYTHON:
            stack.enter_context(replaced(torch, name, skipped))
        yield


class TorchCalls(TorchDispatchMode):
    """Counts torch's operations: "product", "other" (another launch on the device), "view", "on the host"."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket.__name__)
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, found)) if isinstance(x, Tensor)]
        if not any(x.device == META for x in tensors):
            self.count["on the host"] += 1
        elif name in PRODUCTS:
            self.count["product"] += 1
        elif func.is_view or name.startswith(NO_LAUNCH):
            self.count["view"] += 1
        else:
            self.count["other"] += 1
            self.others[name] += 1
        return found
