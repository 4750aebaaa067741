"""The triton backend: the project's own kernels, for GPUs and for Triton's interpreter.

float32 and bfloat16 models. Nothing here waits for the device. The maths stand in each kernel's own file.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
from torch import Tensor

from embedgrad.backends.base import Backend, CacheRows, Head, Heads
from embedgrad.backends.logits import DEVICE_LOGIT_BYTES, logit_blocks, logit_rows, padded
from embedgrad.backends.mask import TreeMask
from embedgrad.kernels import decode_attention as _decode
from embedgrad.kernels import dequantize as _dequantize
from embedgrad.kernels import embed as _embed
from embedgrad.kernels import prompt_step as _prompt_step
from embedgrad.kernels import quantized_linear as _quantized
from embedgrad.kernels import rms_norm as _rms_norm
from embedgrad.kernels import rope as _rope
from embedgrad.kernels import softmax_loss as _softmax_loss
from embedgrad.kernels import swiglu as _swiglu
from embedgrad.kernels import tree_attention as _attention
from embedgrad.kernels import tree_attention_backward as _attention_backward
from embedgrad.kernels.packing import PackedWeight
from embedgrad.kernels.tree_schedule import TreeSchedule
from embedgrad.maths.optimizer import ADAMW, AdamW, Rule, StepReport
from embedgrad.maths.trust_region import KINDS, TrustRegion


def interpreted() -> bool:
    """Whether the kernels were made for Triton's interpreter, which is decided when they are imported."""
    return not isinstance(_embed.embed_kernel, triton.JITFunction)


def _schedule(mask: TreeMask) -> TreeSchedule:
    """The kernels' work lists of a mask, made once."""

    def position(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.int()

    return mask.cached(
        "triton",
        lambda: TreeSchedule(
            mask.key_begin, mask.key_end, mask.query_index, mask.prefix,
            position(mask.query_position), position(mask.key_position), mask.window,
        ),
    )  # fmt: skip


class Triton(Backend):
    """See the module."""

    name = "triton"
    quantized_rows = _quantized.FUSED_ROWS

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> Tensor:
        return _rms_norm.rms_norm(x, weight, eps, out=out)

    def rms_norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, eps: float, *, dx: Tensor) -> Tensor:
        return _rms_norm.rms_norm_backward(dy, x, weight, eps, dx=dx)

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
        return _rope.rope(qkv, cos, sin, heads, q_norm=q_norm, k_norm=k_norm, eps=eps)

    def rope_and_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: Heads,
        cache: CacheRows,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        return _rope.rope(qkv, cos, sin, heads, q_norm=q_norm, k_norm=k_norm, eps=eps, cache=tuple(cache))

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
        return _rope.rope_backward(dqkv, qkv_raw, cos, sin, heads, q_norm=q_norm, k_norm=k_norm, eps=eps)

    def swiglu(self, gate_up: Tensor, *, out: Tensor, gelu: bool = False) -> Tensor:
        return _swiglu.swiglu(gate_up, out=out, gelu=gelu)

    def swiglu_backward(self, da: Tensor, gate_up: Tensor, *, out: Tensor, gelu: bool = False) -> Tensor:
        return _swiglu.swiglu_backward(da, gate_up, out=out, gelu=gelu)

    def plan_attention(
        self,
        mask: TreeMask,
        heads: Heads,
        dtype: torch.dtype,
        device: torch.device,
        *,
        forward: bool = False,
        dq: bool = False,
        dkv: bool = False,
    ) -> None:
        schedule, (h, g, size) = _schedule(mask), heads
        if forward:
            _attention.plan(schedule, h // g, size, dtype, device)
        if dq or dkv:
            _attention_backward.plan(schedule, h, g, size, dtype, device, dq=dq, dkv=dkv)

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
        _attention.tree_attention(q, k, v, _schedule(mask), scale=scale, softcap=softcap, out=out, lse=lse)
        return out, lse

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
        _attention_backward.tree_attention_backward(
            do, q, k, v, o, lse, _schedule(mask), scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv
        )

    def decode_attention(
        self,
        q: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        own_k: Tensor,
        own_v: Tensor,
        own_lengths: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        first_seen: Tensor | None = None,
        out: Tensor,
    ) -> Tensor:
        _decode.decode_attention(
            q, prefix_k, prefix_v, own_k, own_v, own_lengths,
            scale=scale, softcap=softcap, first_seen=first_seen, out=out,
        )  # fmt: skip
        return out

    def embed(self, rows: Tensor, table: Any, ids: Tensor, prompt_rows: Tensor, *, out: Tensor) -> Tensor:
        if not isinstance(table, Tensor):  # stored in blocks: dequantised at `ids`
            table, ids = cast(Any, table)[ids], torch.arange(len(ids), device=ids.device)
        return _embed.embed(rows, table, ids, prompt_rows, out=out)

    def embed_backward(self, dx: Tensor, prompt_rows: Tensor, *, grad: Tensor) -> Tensor:
        return _embed.embed_backward(dx, prompt_rows, grad=grad)

    def linear_cross_entropy_bytes(self, count: int, vocabulary: int, dtype: torch.dtype) -> int:
        return logit_rows(count, vocabulary, DEVICE_LOGIT_BYTES) * padded(vocabulary) * 4

    def linear_cross_entropy(
        self,
        h: Tensor,
        head: Head,
        targets: Tensor,
        weights: Tensor,
        *,
        softcap: float | None = None,
        dh: Tensor | None = None,
        workspace: Tensor | None = None,
        logit_bytes: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        (count, width), device = h.shape, h.device
        nll = torch.empty(count, dtype=torch.float32, device=device)
        predicted = torch.empty(count, dtype=torch.int64, device=device)
        for rows, z in logit_blocks(h, head, workspace, DEVICE_LOGIT_BYTES if logit_bytes is None else logit_bytes):
            half = dh is not None and h.dtype == torch.float16
            factor = torch.empty(len(z), dtype=torch.float32, device=device) if half else None
            dz = _softmax_loss.softmax_loss(
                z, targets[rows], None if dh is None else weights[rows],
                dtype=h.dtype, softcap=softcap, nll=nll[rows], predicted=predicted[rows], factor=factor,
            )  # fmt: skip
            if dh is not None and factor is None:
                head.backward(dz, out=dh[rows])
            elif dh is not None and factor is not None:
                wide = head.backward(dz, out=torch.empty(len(z), width, dtype=torch.float32, device=device))
                dh[rows] = wide.mul_(factor[:, None])
        return nll, predicted

    def dequantize(self, weight: PackedWeight, *, out: Tensor) -> Tensor:
        return _dequantize.dequantize(weight, out=out)

    def quantized_linear(
        self,
        x: Tensor,
        weight: PackedWeight,
        *,
        out: Tensor,
        bias: Tensor | None = None,
        add: Tensor | None = None,
    ) -> Tensor:
        return _quantized.quantized_linear(x, weight, out=out, bias=bias, add=add)

    def quantized_linear_backward(self, dy: Tensor, weight: PackedWeight, *, out: Tensor) -> Tensor:
        return _quantized.quantized_linear_backward(dy, weight, out=out)

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
        if e.dtype != torch.float32 or type(region) not in KINDS.values():
            return super().prompt_step(
                e, e0, m, v, g,
                factors=factors, region=region, rule=rule, clip_norm=clip_norm, alive=alive, before=before,
            )  # fmt: skip
        device = e.device
        alive = torch.ones((), dtype=torch.bool, device=device) if alive is None else alive
        before = torch.empty(3, *e.shape, device=device) if before is None else before
        cosine, ratio = torch.empty(2, len(e), dtype=torch.float64, device=device)
        norm = torch.empty((), dtype=torch.float64, device=device)
        projected = torch.empty(len(e), dtype=torch.bool, device=device)
        if isinstance(rule, AdamW):
            beta1, beta2 = rule.betas
            constants = (beta1, 1 - beta1, beta2, 1 - beta2, rule.eps)
        else:
            constants = (rule.momentum, rule.weight_decay, 0.0, 0.0, 0.0)
        _prompt_step.prompt_step(
            e, e0, m, v, g, factors=factors.to(device), adamw=isinstance(rule, AdamW), constants=constants,
            region=region.numbers(e.dtype), clip_norm=clip_norm, before=before, alive=alive,
            cosine=cosine, norm_ratio=ratio, projected=projected, norm=norm,
        )  # fmt: skip
        return StepReport(cosine, ratio, projected, norm, alive)


OPS = Triton()
