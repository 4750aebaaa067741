"""The frozen transformer: forward, and backward to the prompt's embeddings, written once for every backend.

Equations and names are those of the README's design section ("One frozen block"); `ops` is one of `embedgrad.backends`.
Shapes: T packed tokens of the tree, K kept keys in front, S = K + T, R tokens that predict a target, P tokens that show
a prompt row, d width, H query heads over G key/value heads of size D, F feed-forward width.

What is left out, and why that is exact: there are no weight gradients; the last layer computes queries, attention
output and MLP at the R predicting tokens only, since nothing else is read; the first layer's backward computes dq, dk,
dv and dx at the P prompt tokens only, for the same reason; kept tokens take part as keys and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from embedgrad.model.arena import Arena
from embedgrad.model.config import ModelConfig
from embedgrad.model.step import Step
from embedgrad.model.weights import LayerWeights, Weights
from embedgrad.tree import TreeMask

KEPT = {  # what each memory policy keeps for the backward pass; the rest is computed again
    "all": frozenset({"x", "qkv", "o", "x_mid", "gate_up"}),
    "mlp": frozenset({"x", "qkv", "o", "x_mid"}),
    "layer": frozenset({"x"}),
}


@dataclass
class Saved:
    """One layer's activations; with the policies `mlp` and `layer` some are None until they are computed again."""

    x: Tensor  # [T, d]
    q: Tensor | None = None  # [T or R, H·D], after norm and rotation; a view of the fused buffer where that exists
    kv: Tensor | None = None  # [T, 2·G·D], likewise
    qk_raw: Tensor | None = None  # [T, (H + G)·D]: before norm and rotation, with qk-norm only
    q_raw: Tensor | None = None  # [R, H·D]: likewise, where queries are computed apart
    o: Tensor | None = None  # [T or R, H·D]
    lse: Tensor | None = None  # [T or R, H]
    x_mid: Tensor | None = None  # [T or R, d]
    gate_up: Tensor | None = None  # [T or R, 2·F]
    start: int = 0  # marks of the arena: the layer's own tensors stand behind the first,
    mlp_start: int = 0  # those that only the MLP's backward reads behind the second


class Decoder:
    """A frozen model on one backend. One forward may be followed by one backward of the same step."""

    def __init__(
        self, config: ModelConfig, weights: Weights, ops: ModuleType, dtype: torch.dtype, arena: Arena
    ) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        self.dtype = dtype
        self.sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.arena = arena
        self.heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        self.scale = config.head_dim**-0.5
        self._saved: list[Saved] = []

    # ---- whole passes -------------------------------------------------------------------------------------------

    def forward(self, prompt: Tensor, step: Step, policy: str | None) -> Tensor:
        """Final-normed hidden states at `step.rows` [R, d]; `policy` None keeps nothing for a backward pass."""
        keep = frozenset() if policy is None else KEPT[policy]
        x = self._embed(prompt, step, keep)
        self._saved = []
        for index in range(self.config.num_layers):
            saved, x = self._layer(index, Saved(x), step, keep, forward_only=policy is None)
            if policy is not None:
                self._saved.append(saved)
        self._x_final = x
        out = self.arena.keep(*x.shape, dtype=self.dtype)
        return self.ops.rms_norm(x, self.weights.final_norm, self.config.rms_eps, out=out)

    def backward(self, dh: Tensor, step: Step, grad: Tensor) -> Tensor:
        """grad [k, d] of the prompt's rows, from dh [R, d] at the hidden states that `forward` returned."""
        dx = self.arena.scratch(*dh.shape, dtype=self.dtype).zero_()
        self.ops.rms_norm_backward(dh, self._x_final, self.weights.final_norm, self.config.rms_eps, dx=dx)
        dx_all = dx if step.rows is None else self.arena.scratch(len(step.ids), dx.shape[1], dtype=self.dtype)
        for index in reversed(range(self.config.num_layers)):
            saved = self._saved.pop()
            with self.arena.frame():
                dx = self._layer_backward(index, saved, dx, dx_all, step)
            if index > 0:  # the first layer's dx may be a kept tensor
                self.arena.drop(saved.start)
        shown = step.prompt_rows
        if len(dx) != len(shown):
            assert step.prompt_positions is not None
            shown = _select(shown, step.prompt_positions, torch.empty(len(dx), dtype=shown.dtype, device=shown.device))
        return self.ops.embed_backward(dx, shown, grad=grad)

    def keys_and_values(self, prompt: Tensor, step: Step, take: Callable[[int, Tensor, Tensor], None]) -> Tensor | None:
        """Forward only; `take(layer, k, v)` sees each layer's keys and values [T, G, D].

        Returns the final-normed hidden states at `step.rows` [R, d], or None where `step.rows` is empty: then the last
        layer stops at its keys and values.
        """
        x = self._embed(prompt, step, frozenset())
        last = self.config.num_layers - 1
        for index in range(self.config.num_layers):
            stop = index == last and step.rows is not None and len(step.rows) == 0
            _, x = self._layer(index, Saved(x), step, frozenset(), forward_only=True, take=take, only_keys=stop)
            if stop:
                return None
        out = self.arena.keep(*x.shape, dtype=self.dtype)
        return self.ops.rms_norm(x, self.weights.final_norm, self.config.rms_eps, out=out)

    # ---- one layer ----------------------------------------------------------------------------------------------

    def _embed(self, prompt: Tensor, step: Step, keep: frozenset[str]) -> Tensor:
        x = self.arena.keep(len(step.ids), self.config.hidden_size, dtype=self.dtype)
        return self.ops.embed(prompt, self.weights.embedding, step.ids, step.prompt_rows, out=x)

    def _rows(self, index: int, step: Step) -> Tensor | None:
        return step.rows if index == self.config.num_layers - 1 else None

    def _layer(
        self,
        index: int,
        saved: Saved,
        step: Step,
        keep: frozenset[str],
        *,
        forward_only: bool = False,
        take: Callable[[int, Tensor, Tensor], None] | None = None,
        only_keys: bool = False,
    ) -> tuple[Saved, Tensor]:
        """x → x″. What `keep` names is taken from the bottom of the arena and put into `saved`."""
        layer, rows, x = self.weights.layers[index], self._rows(index, step), saved.x
        size = len(x) if rows is None else len(rows)
        saved.start = self.arena.mark()
        result = x
        if not forward_only:
            result = self.arena.keep(size, self.config.hidden_size, dtype=self.dtype)
        with self.arena.frame():
            self._project(layer, saved, step, rows, keep, only_keys)
            if take is not None:
                take(index, *self._split_kv(saved.kv))
            if only_keys:
                return saved, result
            self._attend(index, layer, saved, step, rows, keep)
            self._gate_up(layer, saved, keep)
            assert saved.x_mid is not None
            assert saved.gate_up is not None
            activation = self.arena.scratch(size, self.config.intermediate_size, dtype=self.dtype)
            self.ops.swiglu(saved.gate_up, out=activation)
            result = result[:size]  # forward only: x is not read any more, and its buffer takes x″
            layer.down.forward(activation, out=result, add=saved.x_mid)
        for name in ("q", "kv", "qk_raw", "q_raw"):
            if "qkv" not in keep:
                setattr(saved, name, None)
        if "o" not in keep:
            saved.o = saved.lse = None
        if "x_mid" not in keep:
            saved.x_mid = None
        if "gate_up" not in keep:
            saved.gate_up = None
        return saved, result

    def _take(self, name: str, keep: frozenset[str], *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        take = self.arena.keep if name in keep else self.arena.scratch
        return take(*shape, dtype=dtype or self.dtype)

    def _at(self, rows: Tensor, *tensors: Tensor) -> list[Tensor]:
        """Each tensor's rows `rows` [n], as scratch."""
        return [_select(x, rows, self.arena.scratch(len(rows), *x.shape[1:], dtype=x.dtype)) for x in tensors]

    def _workspace(self, nbytes: int) -> Tensor | None:
        return self.arena.scratch(nbytes, dtype=torch.uint8) if nbytes else None

    def _project(
        self, layer: LayerWeights, saved: Saved, step: Step, rows: Tensor | None, keep: frozenset[str], only_keys: bool
    ) -> None:
        """q, k, v after norm and rotation."""
        h, g, size = self.heads
        x, eps, config = saved.x, self.config.rms_eps, self.config
        norms = {"q_norm": layer.q_norm, "k_norm": layer.k_norm, "eps": eps}
        if rows is None:
            qkv = self._take("qkv", keep, len(x), (h + 2 * g) * size)
            raw = self._take("qkv", keep, len(x), (h + g) * size) if config.qk_norm else None
            with self.arena.frame():
                normed = self.arena.scratch(len(x), config.hidden_size, dtype=self.dtype)
                self.ops.rms_norm(x, layer.attention_norm, eps, out=normed)
                layer.qkv.forward(normed, out=qkv)
            if raw is not None:
                saved.qk_raw = raw.copy_(qkv[:, : (h + g) * size])
            self.ops.rope(qkv, step.cos, step.sin, self.heads, **norms)
            saved.q, saved.kv = qkv[:, : h * size], qkv[:, h * size :]
            return
        saved.kv = self._take("qkv", keep, len(x), 2 * g * size)
        raw = self._take("qkv", keep, len(x), g * size) if config.qk_norm else None
        q_raw = self._take("qkv", keep, len(rows), h * size) if config.qk_norm else None
        saved.q = self._take("qkv", keep, len(rows), h * size)
        with self.arena.frame():
            normed = self.arena.scratch(len(x), config.hidden_size, dtype=self.dtype)
            self.ops.rms_norm(x, layer.attention_norm, eps, out=normed)
            layer.kv.forward(normed, out=saved.kv)
            if not only_keys:
                (at_rows,) = self._at(rows, normed)
                layer.q.forward(at_rows, out=saved.q)
        if raw is not None and q_raw is not None:
            saved.qk_raw, saved.q_raw = raw.copy_(saved.kv[:, : g * size]), q_raw.copy_(saved.q)
        self.ops.rope(saved.kv, step.cos, step.sin, (0, g, size), **norms)
        if not only_keys:
            with self.arena.frame():
                self.ops.rope(saved.q, *self._at(rows, step.cos, step.sin), (h, 0, size), **norms)

    def _split_kv(self, kv: Tensor | None) -> tuple[Tensor, Tensor]:
        assert kv is not None
        _, g, size = self.heads
        return kv[:, : g * size].unflatten(1, (g, size)), kv[:, g * size :].unflatten(1, (g, size))

    def _keys(self, index: int, saved: Saved, step: Step) -> tuple[Tensor, Tensor]:
        """Keys and values [S, G, D]: the kept units' in front of the tree's own."""
        k, v = self._split_kv(saved.kv)
        if not step.kept:
            return k, v
        whole = self.arena.scratch(2, step.num_kept + len(k), *k.shape[1:], dtype=self.dtype)
        start = 0
        for unit in step.kept:
            whole[:, start : start + unit.shape[2]] = unit[index]
            start += unit.shape[2]
        whole[0, start:], whole[1, start:] = k, v
        return whole[0], whole[1]

    def _mask(self, index: int, step: Step, rows: Tensor | None) -> TreeMask:
        return step.masks[self.config.windows[index]] if rows is None else step.last_mask

    def _attend(
        self, index: int, layer: LayerWeights, saved: Saved, step: Step, rows: Tensor | None, keep: frozenset[str]
    ) -> None:
        """o, lse and x′ = x + o W_oᵀ."""
        h, _, size = self.heads
        x = saved.x
        assert saved.q is not None
        saved.o = self._take("o", keep, len(saved.q), h * size)
        saved.lse = self._take("o", keep, len(saved.q), h, dtype=self.sum_dtype)
        saved.mlp_start = self.arena.mark()
        saved.x_mid = self._take("x_mid", keep, len(saved.q), self.config.hidden_size)
        with self.arena.frame():
            k, v = self._keys(index, saved, step)
            nbytes = self.ops.tree_attention_bytes(len(saved.q), len(k), self.heads)
            with self.arena.frame():
                self.ops.tree_attention(
                    saved.q.unflatten(1, (h, size)),
                    k,
                    v,
                    self._mask(index, step, rows),
                    scale=self.scale,
                    out=saved.o.view(-1, h, size),
                    lse=saved.lse,
                    workspace=self._workspace(nbytes),
                )
            if rows is not None:
                (x,) = self._at(rows, x)
            layer.out.forward(saved.o, out=saved.x_mid, add=x)

    def _gate_up(self, layer: LayerWeights, saved: Saved, keep: frozenset[str]) -> None:
        """The gate/up product of the MLP."""
        assert saved.x_mid is not None
        size = len(saved.x_mid)
        saved.gate_up = self._take("gate_up", keep, size, 2 * self.config.intermediate_size)
        with self.arena.frame():
            normed = self.arena.scratch(size, self.config.hidden_size, dtype=self.dtype)
            self.ops.rms_norm(saved.x_mid, layer.mlp_norm, self.config.rms_eps, out=normed)
            layer.gate_up.forward(normed, out=saved.gate_up)

    # ---- one layer, backward ------------------------------------------------------------------------------------

    def _layer_backward(self, index: int, saved: Saved, dx: Tensor, dx_all: Tensor, step: Step) -> Tensor:
        """dx″ → dx. Returns [T, d], or [P, d] from the first layer where only the prompt's tokens are wanted.

        dx_all [T, d] takes the result of the last layer, where dx″ exists at the R predicting tokens only.
        """
        layer, rows = self.weights.layers[index], self._rows(index, step)
        if saved.q is None:
            self._project(layer, saved, step, rows, frozenset(), only_keys=False)
        if saved.o is None:
            self._attend(index, layer, saved, step, rows, frozenset())
        if saved.gate_up is None:
            self._gate_up(layer, saved, frozenset())
        self._mlp_backward(layer, saved, dx)
        self.arena.drop(saved.mlp_start)
        if rows is not None:
            return self._attention_backward_at_rows(index, layer, saved, dx, dx_all, step, rows)
        if index == 0 and step.prompt_positions is not None:
            return self._attention_backward_at_prompt(index, layer, saved, dx, step, step.prompt_positions)
        return self._attention_backward(index, layer, saved, dx, step)

    def _mlp_backward(self, layer: LayerWeights, saved: Saved, dx: Tensor) -> None:
        """dx″ → dx′, in place; the saved gate/up product is overwritten by its gradient."""
        assert saved.x_mid is not None
        assert saved.gate_up is not None
        with self.arena.frame():
            da = self.arena.scratch(len(dx), self.config.intermediate_size, dtype=self.dtype)
            layer.down.backward(dx, out=da)
            self.ops.swiglu_backward(da, saved.gate_up, out=saved.gate_up)
        with self.arena.frame():
            dh = self.arena.scratch(*dx.shape, dtype=self.dtype)
            layer.gate_up.backward(saved.gate_up, out=dh)
            self.ops.rms_norm_backward(dh, saved.x_mid, layer.mlp_norm, self.config.rms_eps, dx=dx)

    def _do(self, layer: LayerWeights, dx: Tensor) -> Tensor:
        h, _, size = self.heads
        do = self.arena.scratch(len(dx), h * size, dtype=self.dtype)
        return layer.out.backward(dx, out=do).view(-1, h, size)

    def _attention_inputs(self, index: int, saved: Saved, step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        h, _, size = self.heads
        assert saved.q is not None
        assert saved.o is not None
        assert saved.lse is not None
        k, v = self._keys(index, saved, step)
        return saved.q.unflatten(1, (h, size)), k, v, saved.o.view(-1, h, size), saved.lse

    def _rope_backward(
        self,
        layer: LayerWeights,
        d: Tensor,
        raw: Tensor | None,
        at: Tensor | None,
        step: Step,
        heads: tuple[int, int, int],
    ) -> None:
        with self.arena.frame():
            cos, sin = (step.cos, step.sin) if at is None else self._at(at, step.cos, step.sin)
            self.ops.rope_backward(
                d, raw, cos, sin, heads, q_norm=layer.q_norm, k_norm=layer.k_norm, eps=self.config.rms_eps
            )

    def _scores_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: TreeMask,
        *, dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    ) -> None:  # fmt: skip
        nbytes = self.ops.tree_attention_backward_bytes(
            len(q), len(k), self.heads, dq=dq is not None, dkv=dk is not None
        )
        with self.arena.frame():
            self.ops.tree_attention_backward(
                do, q, k, v, o, lse, mask, scale=self.scale, dq=dq, dk=dk, dv=dv, workspace=self._workspace(nbytes)
            )

    def _attention_backward(self, index: int, layer: LayerWeights, saved: Saved, dx: Tensor, step: Step) -> Tensor:
        h, g, size = self.heads
        with self.arena.frame():
            dqkv = self.arena.scratch(len(dx), (h + 2 * g) * size, dtype=self.dtype)
            with self.arena.frame():
                do = self._do(layer, dx)
                q, k, v, o, lse = self._attention_inputs(index, saved, step)
                dk, dv = self._split_kv(dqkv[:, h * size :])
                self._scores_backward(
                    do, q, k, v, o, lse, self._mask(index, step, None),
                    dq=dqkv[:, : h * size].unflatten(1, (h, size)), dk=dk, dv=dv,
                )  # fmt: skip
            self._rope_backward(layer, dqkv, saved.qk_raw, None, step, self.heads)
            dh = self.arena.scratch(*dx.shape, dtype=self.dtype)
            layer.qkv.backward(dqkv, out=dh)
            self.ops.rms_norm_backward(dh, saved.x, layer.attention_norm, self.config.rms_eps, dx=dx)
        return dx

    def _attention_backward_at_rows(
        self, index: int, layer: LayerWeights, saved: Saved, dx: Tensor, dx_all: Tensor, step: Step, rows: Tensor
    ) -> Tensor:
        """The last layer: queries exist at the R predicting tokens only, keys and values everywhere."""
        h, g, size = self.heads
        tokens, width = saved.x.shape
        dx_all.zero_()
        with self.arena.frame():
            dq = self.arena.scratch(len(rows), h * size, dtype=self.dtype)
            dkv = self.arena.scratch(tokens, 2 * g * size, dtype=self.dtype)
            with self.arena.frame():
                do = self._do(layer, dx)
                q, k, v, o, lse = self._attention_inputs(index, saved, step)
                dk, dv = self._split_kv(dkv)
                self._scores_backward(
                    do, q, k, v, o, lse, self._mask(index, step, rows), dq=dq.view(-1, h, size), dk=dk, dv=dv
                )
            self._rope_backward(layer, dq, saved.q_raw, rows, step, (h, 0, size))
            self._rope_backward(layer, dkv, saved.qk_raw, None, step, (0, g, size))
            dh = self.arena.scratch(tokens, width, dtype=self.dtype)
            layer.kv.backward(dkv, out=dh)
            at_rows = self.arena.scratch(len(rows), width, dtype=self.dtype)
            layer.q.backward(dq, out=at_rows)
            if not dh.is_meta:  # as in `_select`
                dh.index_add_(0, rows, at_rows)
                dx_all.index_copy_(0, rows, dx)
            self.ops.rms_norm_backward(dh, saved.x, layer.attention_norm, self.config.rms_eps, dx=dx_all)
        return dx_all

    def _attention_backward_at_prompt(
        self, index: int, layer: LayerWeights, saved: Saved, dx: Tensor, step: Step, shown: Tensor
    ) -> Tensor:
        """The first layer: gradients at the P tokens that show a prompt row, summed over all queries that see them."""
        h, g, size = self.heads
        width = self.config.hidden_size
        dx_shown = _select(dx, shown, self.arena.keep(len(shown), width, dtype=self.dtype))
        with self.arena.frame():
            dqkv = self.arena.scratch(len(shown), (h + 2 * g) * size, dtype=self.dtype)
            with self.arena.frame():
                do = self._do(layer, dx)
                q, k, v, o, lse = self._attention_inputs(index, saved, step)
                mask, keys = self._mask(index, step, None), step.prompt_keys
                assert keys is not None
                dk, dv = self._split_kv(dqkv[:, h * size :])
                with self.arena.frame():
                    own_k, own_v = self._at(keys, k, v)
                    self._scores_backward(do, q, own_k, own_v, o, lse, mask.select_keys(keys), dk=dk, dv=dv)
                do, q, o, lse = self._at(shown, do, q, o, lse)
                self._scores_backward(
                    do, q, k, v, o, lse, mask.select_queries(shown), dq=dqkv[:, : h * size].unflatten(1, (h, size))
                )
            with self.arena.frame():
                raw = None if saved.qk_raw is None else self._at(shown, saved.qk_raw)[0]
                self._rope_backward(layer, dqkv, raw, shown, step, self.heads)
            dh = self.arena.scratch(len(shown), width, dtype=self.dtype)
            layer.qkv.backward(dqkv, out=dh)
            (x,) = self._at(shown, saved.x)
            self.ops.rms_norm_backward(dh, x, layer.attention_norm, self.config.rms_eps, dx=dx_shown)
        return dx_shown


def _select(x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    # While a step is planned nothing is there to be moved, and torch's own index_select on tensors without memory
    # imports its compiler: two seconds and 114 MB.
    return out if x.is_meta else torch.index_select(x, 0, rows, out=out)
