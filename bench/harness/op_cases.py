"""The row-wise operations that `bench ops` times: inputs, what each contender runs, and what must come out.

Sizes are SmolLM2-135M's; the rows are the tokens of a tree. A contender is one of our backends, torch's own way to the
same result, or a library's. Each has its own tensors, because some work in place.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from embedgrad.backends.base import Backend
from embedgrad.backends.reference import OPS as reference
from embedgrad.engine.tree import TokenTree
from embedgrad.maths.optimizer import ADAMW
from embedgrad.maths.trust_region import CosineCone
from embedgrad.model.config import ModelConfig
from embedgrad.model.frozen import FrozenMatrix, Widening

Run = Callable[[], list[Tensor]]

# For each number that comes out: arithmetic instructions of the kernels of csrc/cpu/, numbers loaded, numbers stored. A
# fused multiply-add, a comparison, a division, a root or a shift is one instruction, exp is 12.
OPERATIONS = {
    "rms_norm": (3, 2.25, 1),  # x² summed; x r w (four rows share a load of w)
    "rms_norm_backward": (6, 5.5, 1),  # w dy, w dy x summed, x² summed; dx − x b, w dy, + w dy r
    "rope": (2, 1, 1),
    "rope_backward": (2, 1, 1),
    "swiglu": (18, 2, 1),  # 1 + exp(−g) and its limits: 16; g u / that
    "swiglu_backward": (25, 3, 2),
    "embed": (0, 0, 0),
    "embed_backward": (1, 1, 0),
    "prompt_step": (24, 0, 0),  # AdamW 10; 3 sums in float64 at half the rate and their conversions
}
NARROW_LOAD, NARROW_STORE = 2, 9  # more instructions in bfloat16: extend, shift; round to even, keep NaN, pack


def operations(name: str, dtype: torch.dtype) -> float:
    """Instructions for one number that comes out."""
    count, loads, stores = OPERATIONS[name]
    return count + (NARROW_LOAD * loads + NARROW_STORE * stores if dtype == torch.bfloat16 else 0)


@dataclass
class OpCase:
    """An operation on some rows.

    numbers: how many must be read and written. out: how many come out. truth: the results in float64, in the order in
    which the contenders named in `checked` return them. products: the matrix products alone, in BLAS, for an operation
    that consists mostly of them.
    """

    name: str
    numbers: int
    out: int
    contenders: dict[str, Run]
    truth: Callable[[], list[Tensor]]
    checked: tuple[str, ...]
    tolerance: float
    products: Callable[[], Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)


def cases(
    config: ModelConfig, tree: TokenTree, dtype: torch.dtype, where: torch.device, backends: list[Backend]
) -> list[OpCase]:
    """All operations, on numbers stored in `dtype` on the device `where`."""
    make = _Maker(config, tree, dtype, where, backends)
    found = [*make.norms(), *make.rotations(), *make.activations(), *make.embeddings()]
    if dtype == torch.float32 or where.type == "cuda":
        found += [make.loss(), make.prompt_step()]
    return found


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


class _Maker:
    def __init__(
        self, config: ModelConfig, tree: TokenTree, dtype: torch.dtype, where: torch.device, backends: list[Backend]
    ) -> None:
        self.config, self.tree, self.dtype, self.where, self.backends = config, tree, dtype, where, backends
        self.tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        self.tokens, self.d, self.f = tree.num_tokens, config.hidden_size, config.intermediate_size
        self.heads = (config.num_heads, config.num_kv_heads, config.head_dim)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.where).to(dtype or self.dtype)

    def case(
        self, name: str, numbers: int, out: int, /, *inputs: Any, torch_way: Run | None, changed: int | None = None,
        **outputs: Tensor,
    ) -> OpCase:  # fmt: skip
        """`changed`: the index of the input that is an output too."""

        def runs(backend: Backend, convert: Callable[[Any], Any]) -> Run:
            given, taken = [convert(i) for i in inputs], {key: convert(value) for key, value in outputs.items()}

            def run() -> list[Tensor]:
                getattr(backend, name)(*given, **taken)
                return [*taken.values(), *([] if changed is None else [given[changed]])]

            return run

        def own(x: Any) -> Any:
            return x.clone() if isinstance(x, Tensor) else x

        contenders = {backend.name: runs(backend, own) for backend in self.backends}
        contenders["reference"] = runs(reference, own)
        if torch_way is not None:
            contenders["torch"] = torch_way
        checked = tuple(name for name in contenders if name != "torch")
        return OpCase(name, numbers, out, contenders, runs(reference, _double), checked, self.tolerance)

    def norms(self) -> list[OpCase]:
        n, eps = self.tokens * self.d, self.config.rms_eps
        x, dy, w = self.random(self.tokens, self.d), self.random(self.tokens, self.d), self.random(self.d)
        return [
            self.case("rms_norm", 2 * n, n, x, w, eps, out=torch.empty_like(x),
                      torch_way=lambda: [F.rms_norm(x, (self.d,), w, eps)]),
            self.case("rms_norm_backward", 4 * n, n, dy, x, w, eps, dx=self.random(self.tokens, self.d),
                      torch_way=_backward(lambda leaf: F.rms_norm(leaf, (self.d,), w, eps), x, dy)),
        ]  # fmt: skip

    def rotations(self) -> list[OpCase]:
        h, g, size = self.heads
        qkv = self.random(self.tokens, (h + 2 * g) * size)
        angles = torch.rand(self.tokens, size // 2, device=self.where)
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        out = self.tokens * (h + g) * size
        moved = 2 * out + 2 * cos.numel()
        wide_cos, wide_sin = (torch.cat([a, a], -1)[:, None] for a in (cos, sin))
        turned = qkv[:, : (h + g) * size].unflatten(1, (h + g, size)).contiguous()

        def rotate() -> list[Tensor]:  # as transformers does
            first, second = turned.chunk(2, dim=-1)
            return [turned * wide_cos + torch.cat([-second, first], -1) * wide_sin]

        return [
            self.case("rope", moved, out, qkv, cos, sin, self.heads, changed=0, torch_way=rotate),
            self.case("rope_backward", moved, out, qkv, None, cos, sin, self.heads, changed=0, torch_way=rotate),
        ]

    def activations(self) -> list[OpCase]:
        n = self.tokens * self.f
        gate_up, da = self.random(self.tokens, 2 * self.f), self.random(self.tokens, self.f)

        def activate(x: Tensor) -> Tensor:
            gate, up = x.chunk(2, dim=1)
            return F.silu(gate) * up

        return [
            self.case("swiglu", 3 * n, n, gate_up, out=torch.empty_like(da), torch_way=lambda: [activate(gate_up)]),
            self.case("swiglu_backward", 5 * n, n, da, gate_up, out=torch.empty_like(gate_up),
                      torch_way=_backward(activate, gate_up, da)),
        ]  # fmt: skip

    def embeddings(self) -> list[OpCase]:
        positions = self.tree.prompt_positions
        prompt = self.random(len(positions), self.d, dtype=torch.float32)
        table = self.random(self.config.vocab_size, self.d)
        ids, rows = self.tree.ids.to(self.where), self.tree.prompt_rows.to(self.where)
        into, grad = self.random(self.tokens, self.d), torch.empty_like(prompt)
        shown, at_shown = rows[positions], self.random(len(positions), self.d)
        total = torch.empty_like(prompt)
        n, k = self.tokens * self.d, at_shown.numel()
        return [
            self.case("embed", 2 * n, n, prompt, table, ids, rows, out=into,
                      torch_way=lambda: [F.embedding(ids, table)]),
            self.case("embed_backward", 2 * k, grad.numel(), at_shown, shown, grad=grad,
                      torch_way=lambda: [total.zero_().index_add_(0, shown, at_shown.float())]),
        ]  # fmt: skip

    def loss(self) -> OpCase:
        """Loss of the logits and its gradient at the hidden states, with the products of the head."""
        targets = self.tree.target_ids.to(self.where)
        count, vocabulary = len(targets), self.config.vocab_size
        h, weight = self.random(count, self.d), self.random(vocabulary, self.d) * 0.05
        weights = torch.full((count,), 1 / count, device=self.where)
        head = FrozenMatrix([weight], None, Widening(weight.dtype, weight.device))

        def runs(backend: Backend) -> Run:
            dh = torch.empty_like(h)
            return lambda: [backend.linear_cross_entropy(h, head, targets, weights, dh=dh)[0], dh]

        def by_autograd(loss: Callable[[Tensor], Tensor], states: Tensor) -> list[Tensor]:
            leaf = states.detach().requires_grad_()
            nll = loss(leaf)
            nll.mean().backward()
            assert leaf.grad is not None
            return [nll.detach(), leaf.grad]

        def torch_way() -> list[Tensor]:
            return by_autograd(lambda leaf: F.cross_entropy(leaf @ weight.T, targets, reduction="none"), h)

        def truth() -> list[Tensor]:
            wide = weight.double()
            return by_autograd(lambda leaf: F.cross_entropy(leaf @ wide.T, targets, reduction="none"), h.double())

        contenders = {backend.name: runs(backend) for backend in (*self.backends, reference)}
        contenders["torch"] = torch_way
        logits, back = torch.empty(count, vocabulary, dtype=self.dtype, device=self.where), torch.empty_like(h)

        def products() -> None:
            torch.mm(h, weight.T, out=logits)
            torch.mm(logits, weight, out=back)

        case = OpCase("linear_cross_entropy", 2 * h.numel() + 2 * weight.numel(), h.numel(), contenders, truth,
                      tuple(contenders), 1e-4 if self.dtype == torch.float32 else 3e-2, products)  # fmt: skip
        if importlib.util.find_spec("cut_cross_entropy") is not None:
            cut = _cut_cross_entropy(weight, targets)
            case.contenders["cut-cross-entropy"] = lambda: by_autograd(cut, h)
            case.versions["cut-cross-entropy"] = f"cut-cross-entropy {importlib.metadata.version('cut-cross-entropy')}"
        return case

    def prompt_step(self) -> OpCase:
        k, d = len(self.tree.prompt_positions), self.d
        e0, g = torch.randn(k, d, device=self.where), torch.randn(k, d, device=self.where)
        e, zero = e0 + 0.1 * torch.randn(k, d, device=self.where), torch.zeros(k, d, device=self.where)
        factors = ADAMW.factors(1, 1e-3)
        leaf = torch.nn.Parameter(e.clone())
        adamw = torch.optim.AdamW([leaf], lr=1e-3, weight_decay=0.0, fused=True)

        def runs(backend: Backend, wide: bool = False) -> Run:
            e_, e0_, m, v, g_ = (_double(x) if wide else x.clone() for x in (e, e0, zero, zero, g))
            alive, before = torch.ones((), dtype=torch.bool, device=self.where), torch.stack((e_, m, v))

            def run() -> list[Tensor]:
                backend.prompt_step(
                    e_, e0_, m, v, g_, factors=factors, region=CosineCone(0.95), alive=alive, before=before
                )
                return [e_, m, v]

            return run

        def torch_way() -> list[Tensor]:
            leaf.grad = g
            adamw.step()
            return []

        contenders = {backend.name: runs(backend) for backend in (*self.backends, reference)}
        checked = tuple(contenders)
        contenders["torch"] = torch_way
        return OpCase("prompt_step", 11 * k * d, k * d, contenders, runs(reference, wide=True), checked, 1e-5)


def _backward(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Run:
    """torch's backward of `function` at x; its forward runs once, here."""
    leaf = x.clone().requires_grad_()
    y = function(leaf)

    def run() -> list[Tensor]:
        leaf.grad = None
        y.backward(dy, retain_graph=True)
        return []

    return run


def _cut_cross_entropy(weight: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """The library's portable path on a CPU, its kernels on a GPU."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if weight.device.type == "cuda" else "torch_compile"

    def loss(leaf: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return linear_cross_entropy(leaf, weight, targets, reduction="none", impl=impl)

    return loss
