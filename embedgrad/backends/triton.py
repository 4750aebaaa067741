"""The triton backend: the functions of `reference` on the project's own kernels, for GPUs and Triton's interpreter.

float32 and bfloat16 models. Nothing here waits for the device. Equations and shapes are those of `reference`; what a
function does is said in the kernel's own file.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import triton
from torch import Tensor

from embedgrad import optimizer
from embedgrad.kernels import decode_attention as _decode
from embedgrad.kernels import embed as _embed
from embedgrad.kernels import linear_cross_entropy as _cross_entropy
from embedgrad.kernels import prompt_step as _prompt_step
from embedgrad.kernels import tree_attention as _attention
from embedgrad.kernels import tree_attention_backward as _attention_backward
from embedgrad.kernels.packing import PackedWeight
from embedgrad.kernels.quantized_linear import quantized_linear, quantized_linear_backward
from embedgrad.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from embedgrad.kernels.rope import rope, rope_backward
from embedgrad.kernels.swiglu import swiglu, swiglu_backward
from embedgrad.kernels.tree_schedule import TreeSchedule
from embedgrad.tree import TreeMask
from embedgrad.trust_region import Penalty, TrustRegion

NAME = "triton"

__all__ = [
    "NAME", "add_rms_norm", "decode_attention", "embed", "embed_backward", "interpreted", "linear_cross_entropy",
    "linear_cross_entropy_bytes", "prompt_step", "quantized_linear", "quantized_linear_backward", "rms_norm",
    "rms_norm_backward", "rope", "rope_backward", "swiglu", "swiglu_backward", "tree_attention",
    "tree_attention_backward", "tree_attention_backward_bytes", "tree_attention_bytes",
]  # fmt: skip


class Head(Protocol):
    """The frozen matrix [V, d] in front of the softmax, as it is stored: one part."""

    @property
    def parts(self) -> list[Any]: ...


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
            mask.key_begin, mask.key_end, mask.query_index, mask.kept,
            position(mask.query_position), position(mask.key_position), mask.window,
        ),
    )  # fmt: skip


def tree_attention_bytes(queries: int, keys: int, heads: tuple[int, int, int]) -> int:
    """None: the kernels' workspace is the allocator's (`embedgrad.memory` counts it)."""
    return 0


def tree_attention_backward_bytes(
    queries: int, keys: int, heads: tuple[int, int, int], *, dq: bool = True, dkv: bool = True
) -> int:
    """None, likewise."""
    return 0


def linear_cross_entropy_bytes(count: int, vocabulary: int, dtype: torch.dtype) -> int:
    """None, likewise."""
    return 0


def tree_attention(
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
    """o and lse; q, out [Nq, H, D]; k, v [S, G, D]; lse [Nq, H] float32."""
    _attention.tree_attention(q, k, v, _schedule(mask), scale=scale, softcap=softcap, out=out, lse=lse)
    return out, lse


def tree_attention_backward(
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
    """dq [Nq, H, D]; dk and dv (together) [S − mask.kept, G, D]; what is None is not computed."""
    _attention_backward.tree_attention_backward(
        do, q, k, v, o, lse, _schedule(mask), scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv
    )


def linear_cross_entropy(
    h: Tensor,
    head: Head,
    targets: Tensor,
    weights: Tensor,
    *,
    softcap: float | None = None,
    dh: Tensor | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """nll [N] float32 and arg-max [N] int64 of softmax(h Wᵀ), and where wanted dh; the head is read as it is stored."""
    (stored,) = head.parts
    return _cross_entropy.linear_cross_entropy(h, stored, targets, weights, softcap=softcap, dh=dh)


def embed(rows: Tensor, table: Tensor | PackedWeight, ids: Tensor, prompt_rows: Tensor, *, out: Tensor) -> Tensor:
    """out[i] = rows[prompt_rows[i]] where a prompt row is shown, else table[ids[i]].

    A table that is stored in blocks is dequantised at `ids` first.
    """
    if not isinstance(table, Tensor):
        table, ids = cast(Any, table)[ids], torch.arange(len(ids), device=ids.device)
    return _embed.embed(rows, table, ids, prompt_rows, out=out)


def embed_backward(dx: Tensor, prompt_rows: Tensor, *, grad: Tensor) -> Tensor:
    """grad[r] = Σ of dx[i] over the positions i that show row r, in order of position; grad [k, d] float32."""
    return _embed.embed_backward(dx, prompt_rows, grad=grad)


def decode_attention(
    q: Tensor,
    trunk_k: Tensor,
    trunk_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    own_lengths: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    first_seen: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """One new query per sequence: q, out [B, H, D]; trunk_k, trunk_v [S, G, D]; own_k, own_v [B, C, G, D]."""
    _decode.decode_attention(
        q, trunk_k, trunk_v, own_k, own_v, own_lengths, scale=scale, softcap=softcap, first_seen=first_seen, out=out
    )
    return out


def prompt_step(
    e: Tensor,
    e0: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    step: int,
    lr: float,
    region: TrustRegion,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optimizer.StepReport:
    """`optimizer.prompt_step` in one launch; a float64 prompt takes the plain form.

    As there, `g` holds a penalty's share already.
    """
    if e.dtype != torch.float32:
        return optimizer.prompt_step(
            e, e0, m, v, g, step=step, lr=lr, region=region, betas=betas, eps=eps, weight_decay=weight_decay
        )
    cosine, ratio = torch.empty(2, len(e), dtype=torch.float32, device=e.device)
    projected = torch.empty(len(e), dtype=torch.bool, device=e.device)
    described = {"kind": "none"} if isinstance(region, Penalty) else region.describe()
    _prompt_step.prompt_step(
        e, e0, m, v, g, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, region=described,
        cosine=cosine, norm_ratio=ratio, projected=projected,
    )  # fmt: skip
    return optimizer.StepReport(cosine.double(), ratio.double(), projected)
