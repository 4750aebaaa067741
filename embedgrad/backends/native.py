"""The native backend: the project's own C++ (csrc/), for models on CPUs.

Numbers are stored in float32 or bfloat16 and summed in float32. The reference backend does what csrc/ does not:
float64 and float16 tensors, rows that are not contiguous, and the ops that are mostly a call into BLAS.
Importing this raises ImportError where csrc/ was not built or does not fit the installed torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from embedgrad.backends import native_core
from embedgrad.backends.base import Head, Heads
from embedgrad.backends.logits import logit_blocks, logit_rows, padded
from embedgrad.backends.mask import TreeMask
from embedgrad.backends.reference import LOGIT_BYTES, Reference
from embedgrad.maths.optimizer import ADAMW, AdamW, Rule, StepReport
from embedgrad.maths.trust_region import KINDS, TrustRegion

INSTRUCTION_SETS = (
    "plain",
    "avx2",
    "avx512",
    "avx512vnni",
)  # from the least to the most; "avx512vnni": products of bytes
BLOCK_ROWS = 96  # rows (queries · heads of a group) that share one read of a key
TABLE_ROWS = 256  # rows of a packed embedding table that are dequantised at once


def _load() -> None:
    path = native_core.library_path()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"csrc/ was built for another torch: {error}") from error
    for name in (
        "rms_norm", "rms_norm_backward", "rope", "rope_backward", "swiglu", "swiglu_backward",
        "softmax_loss", "embed", "embed_backward", "prompt_step", "tree_attention",
        "tree_attention_backward",
    ):  # fmt: skip
        torch.library.register_fake(f"embedgrad::{name}", lambda *_, **__: None)

    def schedule(key_begin: Tensor, *_: Any) -> Tensor:
        return key_begin.new_empty(torch.library.get_ctx().new_dynamic_size())

    torch.library.register_fake("embedgrad::tree_schedule", schedule)


_load()
_ops = torch.ops.embedgrad


def instruction_set() -> str:
    """One of INSTRUCTION_SETS: what the ops use, the best that this machine has."""
    return _ops.isa()


@contextmanager
def using(instruction_set: str) -> Iterator[None]:
    """Inside, the ops use this instruction set. Raises ValueError where the machine has not got it."""
    before = _ops.isa()
    _ops.use_isa(instruction_set)
    try:
        yield
    finally:
        _ops.use_isa(before)


def _fits(*tensors: Tensor | None) -> bool:
    """Whether they are stored alike, in a type and with rows that csrc/ takes."""
    dtype = None
    for x in tensors:
        if x is None:
            continue
        if dtype is None:
            dtype = x.dtype
            if dtype is not torch.float32 and dtype is not torch.bfloat16:
                return False
        if x.dtype is not dtype or not x.is_cpu or (x.stride(-1) != 1 and x.shape[-1] > 1):
            return False
    return True


def _norms_fit(x: Tensor, *norms: Tensor | None) -> bool:
    """Whether csrc/ takes weights of norms [d] for rows like x: in float32, or in the rows' own type."""
    return _fits(*norms) and all(norm is None or norm.dtype in (x.dtype, torch.float32) for norm in norms)


def _workspace(workspace: Tensor | None, nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8) if workspace is None else workspace


class Native(Reference):
    """See the module."""

    name = "native"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> Tensor:
        if not _fits(x, out) or not _norms_fit(x, weight):
            return super().rms_norm(x, weight, eps, out=out)
        _ops.rms_norm(x, weight, eps, out)
        return out

    def rms_norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, eps: float, *, dx: Tensor) -> Tensor:
        if not _fits(dy, x, dx) or not _norms_fit(x, weight):
            return super().rms_norm_backward(dy, x, weight, eps, dx=dx)
        _ops.rms_norm_backward(dy, x, weight, eps, dx)
        return dx

    def rope(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: Heads,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        if not _fits(qkv, cos, sin) or not _norms_fit(qkv, q_norm, k_norm):
            return super().rope(qkv, cos, sin, heads, q_norm=q_norm, k_norm=k_norm, eps=eps)
        _ops.rope(qkv, cos.contiguous(), sin.contiguous(), *heads, q_norm, k_norm, eps)
        return qkv

    def rope_backward(
        self,
        dqkv: Tensor,
        qkv_raw: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        heads: Heads,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        if not _fits(dqkv, qkv_raw, cos, sin) or not _norms_fit(dqkv, q_norm, k_norm):
            return super().rope_backward(dqkv, qkv_raw, cos, sin, heads, q_norm=q_norm, k_norm=k_norm, eps=eps)
        _ops.rope_backward(dqkv, qkv_raw, cos.contiguous(), sin.contiguous(), *heads, q_norm, k_norm, eps)
        return dqkv

    def swiglu(self, gate_up: Tensor, *, out: Tensor, gelu: bool = False) -> Tensor:
        if not _fits(gate_up, out):
            return super().swiglu(gate_up, out=out, gelu=gelu)
        _ops.swiglu(gate_up, out, gelu)
        return out

    def swiglu_backward(self, da: Tensor, gate_up: Tensor, *, out: Tensor, gelu: bool = False) -> Tensor:
        if not _fits(da, gate_up, out):
            return super().swiglu_backward(da, gate_up, out=out, gelu=gelu)
        _ops.swiglu_backward(da, gate_up, out, gelu)
        return out

    def tree_attention_bytes(self, queries: int, keys: int, heads: Heads) -> int:
        h, g, size = heads
        return _ops.tree_attention_bytes(keys, g, size, min(queries, _block_queries(h // g)) * (h // g))

    def tree_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: TreeMask,
        *,
        scale: float,
        softcap: float | None = None,
        out: Tensor,
        lse: Tensor,
        workspace: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        fits = _heads_fit(q, k, v, out) and lse.dtype == torch.float32 and lse.is_contiguous()
        if not fits:
            return super().tree_attention(q, k, v, mask, scale=scale, softcap=softcap, out=out, lse=lse)
        memory = _workspace(workspace, self.tree_attention_bytes(*_sizes(q, k)))
        schedule = _schedule(mask, q.shape[1] // k.shape[1])
        _ops.tree_attention(q, k, v, *schedule, scale, softcap or 0.0, out, lse, memory)
        return out, lse

    def tree_attention_backward_bytes(
        self, queries: int, keys: int, heads: Heads, *, dq: bool = True, dkv: bool = True
    ) -> int:
        h, g, size = heads
        rows = min(queries, _block_queries(h // g)) * (h // g)
        return _ops.tree_attention_backward_bytes(keys, g, size, rows, dq, dkv)

    def tree_attention_backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        mask: TreeMask,
        *,
        scale: float,
        softcap: float | None = None,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> None:
        fits = _heads_fit(do, q, k, v, o, dq, dk, dv) and lse.dtype == torch.float32 and lse.is_contiguous()
        if not fits or (dk is None) != (dv is None):
            super().tree_attention_backward(
                do, q, k, v, o, lse, mask, scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv
            )
            return
        needed = self.tree_attention_backward_bytes(*_sizes(q, k), dq=dq is not None, dkv=dk is not None)
        schedule = _schedule(mask, q.shape[1] // k.shape[1])
        scores = scale, softcap or 0.0
        _ops.tree_attention_backward(do, q, k, v, o, lse, *schedule, *scores, dq, dk, dv, _workspace(workspace, needed))

    def embed(self, rows: Tensor, table: Any, ids: Tensor, prompt_rows: Tensor, *, out: Tensor) -> Tensor:
        if not _fits(out) or not _fits(rows):
            return super().embed(rows, table, ids, prompt_rows, out=out)
        rows, ids, prompt_rows = rows.float(), ids.contiguous(), prompt_rows.contiguous()
        if isinstance(table, Tensor) and _fits(table):
            _ops.embed(rows, table, ids, prompt_rows, out)
            return out
        for start in range(0, len(ids), TABLE_ROWS):
            block = slice(start, start + TABLE_ROWS)
            out[block] = table[ids[block]]
        _ops.embed(rows, None, ids, prompt_rows, out)
        return out

    def embed_backward(self, dx: Tensor, prompt_rows: Tensor, *, grad: Tensor) -> Tensor:
        if not _fits(dx) or not _fits(grad) or grad.dtype != torch.float32:
            return super().embed_backward(dx, prompt_rows, grad=grad)
        _ops.embed_backward(dx, prompt_rows.contiguous(), grad)
        return grad

    def linear_cross_entropy_bytes(self, count: int, vocabulary: int, dtype: torch.dtype) -> int:
        return logit_rows(count, vocabulary, LOGIT_BYTES) * padded(vocabulary) * 4

    def linear_cross_entropy(
        self,
        h: Tensor,
        head: Head,
        targets: Tensor,
        weights: Tensor,
        *,
        softcap: float | None = None,
        dh: Tensor | None = None,
        logit_bytes: int | None = None,
        workspace: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not _fits(h, dh) or weights.dtype != torch.float32:
            return super().linear_cross_entropy(
                h, head, targets, weights, softcap=softcap, dh=dh, logit_bytes=logit_bytes
            )
        nll, predicted = torch.empty(len(h)), torch.empty(len(h), dtype=torch.int64)
        targets, weights = targets.contiguous(), weights.contiguous()
        for rows, z in logit_blocks(h, head, workspace, LOGIT_BYTES if logit_bytes is None else logit_bytes):
            wanted = targets[rows], None if dh is None else weights[rows]
            _ops.softmax_loss(z, *wanted, softcap or 0.0, nll[rows], predicted[rows])
            if dh is not None:
                head.backward(z, out=dh[rows])
        return nll, predicted

    def prompt_step(
        self,
        e: Tensor,
        e0: Tensor,
        m: Tensor,
        v: Tensor,
        g: Tensor,
        *,
        factors: Tensor,
        region: TrustRegion,
        rule: Rule = ADAMW,
        clip_norm: float | None = None,
        alive: Tensor | None = None,
        before: Tensor | None = None,
    ) -> StepReport:
        known = isinstance(rule, AdamW) and type(region) in KINDS.values()
        if not known or e.dtype != torch.float32 or not _fits(e, e0, m, v, g):
            return super().prompt_step(
                e, e0, m, v, g,
                factors=factors, region=region, rule=rule, clip_norm=clip_norm, alive=alive, before=before,
            )  # fmt: skip
        assert isinstance(rule, AdamW)
        pull = region.penalty_gradient(e, e0)
        g = g if pull is None else g.add_(pull)
        alive = torch.ones((), dtype=torch.bool) if alive is None else alive
        before = torch.empty(3, *e.shape) if before is None else before
        similarity, ratio = torch.empty(2, len(e), dtype=torch.float64)
        projected = torch.empty(len(e), dtype=torch.bool)
        norm = torch.empty((), dtype=torch.float64)
        decay, rate, correction = factors.tolist()
        (beta1, beta2), n = rule.betas, region.numbers(e.dtype)
        adamw = [1 - beta1, beta2, 1 - beta2, decay, rate, correction, rule.eps]
        bounds = [
            n.code, n.tau, n.inside, n.cosine, n.sine, n.close, n.norm_min, n.norm_max, n.radius, n.relative,
            n.tolerance,
        ]  # fmt: skip
        limit = -1.0 if clip_norm is None else clip_norm
        _ops.prompt_step(e, e0, m, v, g, adamw, bounds, limit, before, similarity, ratio, projected, norm, alive)
        return StepReport(similarity, ratio, projected, norm, alive)


def _block_queries(group: int) -> int:
    return max(1, BLOCK_ROWS // group)


def _schedule(mask: TreeMask, group: int) -> tuple[Tensor | int | None, ...]:
    """The mask as csrc/ takes it and what each block of queries sees; made once per mask and used by every layer."""

    def indices(x: Tensor | None) -> Tensor | None:
        return None if x is None or mask.window is None else x.int().contiguous()

    def plan() -> tuple[Tensor | int | None, ...]:
        blocks = mask.query_slices(_block_queries(group))
        starts = torch.tensor([*(block.start for block in blocks), len(mask.query_index)], dtype=torch.int32)
        shared = (mask.key_begin.contiguous(), mask.key_end.contiguous(), mask.query_index.contiguous(), starts)
        positions = (indices(mask.query_position), indices(mask.key_position), mask.window or 0)
        return (*shared, _ops.tree_schedule(*shared, *positions), mask.prefix, *positions)

    return mask.cached(("native", group), plan)


def _heads_fit(*tensors: Tensor | None) -> bool:
    return _fits(*tensors) and all(
        x is None or x.dim() != 3 or x.stride(1) == x.shape[2] or x.shape[1] <= 1 for x in tensors
    )


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, tuple[int, int, int]]:
    return len(q), len(k), (q.shape[1], k.shape[1], q.shape[2])


OPS = Native()
