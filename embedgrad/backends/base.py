"""The operations that a backend has: every signature and contract once.

The decoder is handed one `Backend` and calls nothing else. Shapes: T tokens, d width, H query heads over G key/value
heads of size D, F feed-forward width, Nq query rows, S keys, N targets, V vocabulary, k prompt rows, B sequences.
Float types are the model's unless a type is named; 16-bit inputs are summed in float32. An output is given by the
caller, is overwritten, and is returned where there is one. The equations are those of `naive`, which is section 4 of
docs/design.md to the letter.

Some operations need working memory. `…_bytes` says how much, so that it can come from the arena as `workspace` (uint8,
on the op's device); without one the operation allocates it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from embedgrad.backends.mask import TreeMask
from embedgrad.maths import optimizer
from embedgrad.maths.optimizer import ADAMW, Rule, StepReport
from embedgrad.maths.trust_region import TrustRegion

Heads = tuple[int, int, int]
"""H query heads, G key/value heads, and their size D; H or G is 0 in a buffer that has only the others."""


class CacheRows(NamedTuple):
    """Where a KV cache takes the keys and values of T tokens: keys, values [N, G, D], rows [T] int64, all different."""

    keys: Tensor
    values: Tensor
    rows: Tensor


def split_keys(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Keys and values [T, G, D] in a buffer [T, (H + 2G)·D]."""
    h, g, size = heads
    own = qkv[:, h * size :]
    return own[:, : g * size].unflatten(1, (g, size)), own[:, g * size :].unflatten(1, (g, size))


class Head(Protocol):
    """The frozen matrix [V, d] in front of the softmax (`embedgrad.model.frozen.FrozenMatrix`)."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def forward(self, x: Tensor, out: Tensor) -> Tensor: ...
    def backward(self, dy: Tensor, out: Tensor) -> Tensor: ...


class Backend(ABC):
    """Every operation of a frozen transformer's forward and backward pass, and of the prompt's step."""

    name: ClassVar[str]
    quantized_rows: ClassVar[int] = 0
    """Rows up to which `quantized_linear` and its backward are faster than dequantising first; 0: they do not exist."""

    # ---- rows of the residual stream ---------------------------------------------------------------------------------

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> Tensor:
        """out = x̂ ⊙ w with x̂ = x·r and r = rsqrt(mean(x²) + eps); x, out [T, d], weight [d].

        x̂ is rounded to x's type before the product with w, as transformers' Llama does. A weight in float32 multiplies
        x̂ as it is, and the product is rounded, as in Gemma and OLMo 2. So do the norms of `rope`.
        """

    @abstractmethod
    def rms_norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, eps: float, *, dx: Tensor) -> Tensor:
        """dx += r (w ⊙ dy − x̂ · mean(x̂ ⊙ w ⊙ dy)); dy, x, dx [T, d], weight [d]."""

    @abstractmethod
    def rope(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads,
        *, q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Rotates q and k in place, each head's RMS norm first where its weight [D] is given.

        qkv [T, (H + 2G)·D] (the G value heads stay), cos and sin [T, D/2].
        """

    def rope_and_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads, cache: CacheRows,
        *, q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """`rope`, and the rotated keys and the values of token t in row `cache.rows[t]` of the KV cache."""
        self.rope(qkv, cos, sin, heads, q_norm=q_norm, k_norm=k_norm, eps=eps)
        keys, values = split_keys(qkv, heads)
        self.put_rows(cache.keys, cache.rows, keys)
        self.put_rows(cache.values, cache.rows, values)
        return qkv

    @abstractmethod
    def rope_backward(
        self, dqkv: Tensor, qkv_raw: Tensor | None, cos: Tensor, sin: Tensor, heads: Heads,
        *, q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """The transpose of `rope` in place on dqkv [T, (H + 2G)·D].

        qkv_raw [T, ≥ (H + G)·D]: the projections before norm and rotation; read only where there is a norm.
        """

    @abstractmethod
    def swiglu(self, gate_up: Tensor, *, out: Tensor, gelu: bool = False) -> Tensor:
        """out = g σ(z) ⊙ u with z = g; gate_up = [g, u] [T, 2F], out [T, F].

        gelu: GeGLU instead, with z = 2√(2/π)(g + 0.044715 g³): GELU in its tanh form, ½ g (1 + tanh(z/2)) = g σ(z).
        """

    @abstractmethod
    def swiglu_backward(self, da: Tensor, gate_up: Tensor, *, out: Tensor, gelu: bool = False) -> Tensor:
        """out = [dg, du], dg = da ⊙ u ⊙ σ(z)(1 + g z′(1 − σ(z))), du = da ⊙ g σ(z); da [T, F], gate_up, out [T, 2F].

        z′ is 1, with `gelu` 2√(2/π)(1 + 0.134145 g²). out may be gate_up itself.
        """

    def scale(self, x: Tensor, factor: float, *, out: Tensor) -> Tensor:
        """out = factor·x, for tensors of one shape; out may be x itself."""
        return torch.mul(x, factor, out=out)

    def add_scaled(self, x: Tensor, y: Tensor, factor: float, *, out: Tensor) -> Tensor:
        """out = x + factor·y, for tensors of one shape; out may be x or y itself."""
        return torch.add(x, y, alpha=factor, out=out)

    # ---- attention ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def tree_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: TreeMask,
        *, scale: float, softcap: float | None = None, out: Tensor, lse: Tensor, workspace: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """o = softmax(s) v and lse = log Σ exp s over the visible keys; s = scale·q kᵀ, or c·tanh(scale·q kᵀ/c).

        q, out [Nq, H, D]; k, v [S, G, D]; lse [Nq, H] float32 (float64 for float64); softcap c. A query that sees no
        key gives o = 0 and lse = −∞.
        """

    @abstractmethod
    def tree_attention_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: TreeMask,
        *, scale: float, softcap: float | None = None, dq: Tensor | None = None, dk: Tensor | None = None,
        dv: Tensor | None = None, workspace: Tensor | None = None,
    ) -> None:  # fmt: skip
        """P = exp(s − lse), dV = Pᵀ do, dS = P ⊙ (do Vᵀ − Σ do ⊙ o), dq = scale·dS k, dk = scale·dSᵀ q.

        do, o, dq [Nq, H, D]; dk, dv [S − mask.prefix, G, D] for the tree's own keys, summed over a group's query heads.
        What is None is not computed; dk and dv are given together.
        """

    def plan_attention(  # noqa: B027
        self, mask: TreeMask, heads: Heads, dtype: torch.dtype, device: torch.device,
        *, forward: bool = False, dq: bool = False, dkv: bool = False,
    ) -> None:  # fmt: skip
        """Make the work lists that these parts of attention on `device` need, while the mask is on the host.

        A mask that was not planned is planned when it is used.
        """

    def tree_attention_bytes(self, queries: int, keys: int, heads: Heads) -> int:
        """Bytes of `tree_attention`'s workspace."""
        return 0

    def tree_attention_backward_bytes(
        self, queries: int, keys: int, heads: Heads, *, dq: bool = True, dkv: bool = True
    ) -> int:
        """Bytes of `tree_attention_backward`'s workspace."""
        return 0

    @abstractmethod
    def decode_attention(
        self, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, own_k: Tensor, own_v: Tensor, own_lengths: Tensor,
        *, scale: float, softcap: float | None = None, first_seen: Tensor | None = None, out: Tensor,
    ) -> Tensor:  # fmt: skip
        """One new query per sequence against the shared prefix and its own keys; 0 for a query without any key.

        q, out [B, H, D]; prefix_k, prefix_v [S, G, D]; own_k, own_v [B, C, G, D], of which own_lengths [B] count.
        first_seen [B]: with a sliding window, the first key that a query sees, counted through prefix and own keys.
        """

    # ---- the two ends of the model -----------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, rows: Tensor, table: Any, ids: Tensor, prompt_rows: Tensor, *, out: Tensor) -> Tensor:
        """out[i] = rows[prompt_rows[i]] where that is ≥ 0, else table[ids[i]].

        rows [k, d], table [V, d] (a tensor, or a table stored in blocks), ids and prompt_rows [T] int64, out [T, d].
        """

    @abstractmethod
    def embed_backward(self, dx: Tensor, prompt_rows: Tensor, *, grad: Tensor) -> Tensor:
        """grad[r] = Σ dx[i] over the positions i that show row r, in ascending order of i; dx [T, d], grad [k, d].

        prompt_rows [T] int64, −1 where no row is shown. grad is float32, or float64 for float64.
        """

    @abstractmethod
    def linear_cross_entropy(
        self, h: Tensor, head: Head, targets: Tensor, weights: Tensor,
        *, softcap: float | None = None, dh: Tensor | None = None, workspace: Tensor | None = None,
        logit_bytes: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Negative log-likelihood [N] of `targets` under softmax(h Wᵀ), and the arg-max token [N] int64.

        h, dh [N, d], targets [N] int64 (−1: ignored, its nll and its row of dh are 0), weights [N]. dh becomes
        Σ weights·dnll/dh. logit_bytes: how much of the logit matrix may exist at once (None: the backend's default).
        """

    def linear_cross_entropy_bytes(self, count: int, vocabulary: int, dtype: torch.dtype) -> int:
        """Bytes of `linear_cross_entropy`'s workspace."""
        return 0

    # ---- rows picked from a matrix -----------------------------------------------------------------------------------

    def take_rows(self, x: Tensor, rows: Tensor, *, out: Tensor) -> Tensor:
        """out[n] = x[rows[n]]; x [T, …], rows [n] int64, out [n, …]."""
        return torch.index_select(x, 0, rows, out=out)

    def put_rows(self, x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        """x[rows[n]] = values[n] in place; where a row is named twice, both values must be 0."""
        return x.index_copy_(0, rows, values)

    def add_rows(self, x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        """x[rows[n]] += values[n] in place; where a row is named twice, both values must be 0."""
        return x.index_add_(0, rows, values)

    # ---- products with packed weights --------------------------------------------------------------------------------

    def dequantize(self, weight: Any, *, out: Tensor) -> Tensor:
        """out [n, m] = the int8 or int4 `PackedWeight` W [n, m]."""
        return out.copy_(weight.dequantize())

    def quantized_linear(
        self, x: Tensor, weight: Any, *, out: Tensor, bias: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor:
        """out [T, n] = x [T, m] Wᵀ (+ bias [n]) (+ add [T, n]) for an int8 or int4 `PackedWeight` W [n, m]."""
        raise NotImplementedError(f"the backend {self.name} multiplies no packed weights")

    def quantized_linear_backward(self, dy: Tensor, weight: Any, *, out: Tensor) -> Tensor:
        """out [T, m] = dy [T, n] W."""
        raise NotImplementedError(f"the backend {self.name} multiplies no packed weights")

    # ---- the prompt --------------------------------------------------------------------------------------------------

    def prompt_step(
        self, e: Tensor, e0: Tensor, m: Tensor, v: Tensor, g: Tensor,
        *, factors: Tensor, region: TrustRegion, rule: Rule = ADAMW, clip_norm: float | None = None,
        alive: Tensor | None = None, before: Tensor | None = None,
    ) -> StepReport:  # fmt: skip
        """`embedgrad.maths.optimizer.prompt_step`, where its contract stands."""
        return optimizer.prompt_step(
            e, e0, m, v, g,
            factors=factors, region=region, rule=rule, clip_norm=clip_norm, alive=alive, before=before,
        )  # fmt: skip
