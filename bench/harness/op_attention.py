"""Tree attention beside torch's own attention on the same tree."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness.contenders import TARGETS, Case
from bench.harness.op_cases import Run
from embedgrad.backends.base import Backend
from embedgrad.engine.tree import TokenTree
from embedgrad.model.config import ModelConfig


class Attention:
    """Forward and backward on one tree, by backends and by `scaled_dot_product_attention`.

    "torch, masked" takes the packed tokens and a mask. "torch, dense" takes a causal batch in which every query has its
    own copy of the prompt.
    """

    def __init__(
        self, config: ModelConfig, tree: TokenTree, case: Case, where: torch.device, dtype: torch.dtype,
        backends: list[Backend],
    ) -> None:  # fmt: skip
        h, g, d = config.num_heads, config.num_kv_heads, config.head_dim
        tokens = tree.num_tokens
        self.scale = d**-0.5
        self._q, self._k, self._v, self._do = (torch.randn(tokens, n, d, device=where).to(dtype) for n in (h, g, g, h))
        self._mask = tree.mask().moved(lambda x: x.to(where))
        self._visible = self._mask.visible()
        self.pairs = int(self._visible.sum()) * h
        self.forward: dict[str, Run] = {}
        self.backward: dict[str, Run] = {}
        for backend in backends:
            self.forward[backend.name], self.backward[backend.name] = self._ours(backend)
        length = case.prompt + case.query + TARGETS - 1
        repeated = [torch.randn(case.batch * length, n, d, device=where).to(dtype) for n in (h, g, g, h)]
        for name, sdpa in (
            ("torch, masked", _Sdpa(self._q, self._k, self._v, self._do, scale=self.scale, mask=self._visible)),
            ("torch, dense", _Sdpa(*repeated, scale=self.scale, batch=case.batch)),
        ):
            self.forward[name], self.backward[name] = sdpa.forward, sdpa.backward

    def _ours(self, backend: Backend) -> tuple[Run, Run]:
        q, k, v, do = self._q, self._k, self._v, self._do
        out, dq, dk, dv = (torch.empty_like(x) for x in (q, q, k, v))
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)

        def forward() -> list[Tensor]:
            backend.tree_attention(q, k, v, self._mask, scale=self.scale, out=out, lse=lse)
            return [out]

        def backward() -> list[Tensor]:
            backend.tree_attention_backward(do, q, k, v, out, lse, self._mask, scale=self.scale, dq=dq, dk=dk, dv=dv)
            return [dq, dk, dv]

        forward()
        return forward, backward

    def truth(self) -> tuple[list[Tensor], list[Tensor]]:
        """The results forward and backward, in float64."""
        wide = [x.double() for x in (self._q, self._k, self._v, self._do)]
        sdpa = _Sdpa(*wide, scale=self.scale, mask=self._visible)
        sdpa.backward()
        found = [leaf.grad for leaf in (sdpa.q, sdpa.k, sdpa.v)]
        return [sdpa.forward()[0].transpose(0, 1)], [x.transpose(0, 1) for x in found if x is not None]


class _Sdpa:
    """torch's attention on packed heads [T, n, d]: with a mask [T, T], or as a causal batch of equal sequences."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, *, scale: float, mask: Tensor | None = None, batch: int = 1
    ) -> None:
        def heads(x: Tensor) -> Tensor:
            split = x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()
            return (split if batch > 1 or mask is None else split[0]).requires_grad_()

        self.q, self.k, self.v = heads(q), heads(k), heads(v)
        self._do, self._mask, self._scale = heads(do).detach(), mask, scale
        self._out = self._attend()

    def _attend(self) -> Tensor:
        q, k, v = (x if x.dim() == 4 else x[None] for x in (self.q, self.k, self.v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, self._mask, is_causal=self._mask is None, scale=self._scale, enable_gqa=True
        )
        return out if self.q.dim() == 4 else out[0]

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return [self._attend()]

    def backward(self) -> list[Tensor]:
        """The backward pass of the attention that `__init__` has computed."""
        self.q.grad = self.k.grad = self.v.grad = None
        self._out.backward(self._do, retain_graph=True)
        return []
