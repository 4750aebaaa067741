"""Cases of the kernels that work row by row: norms, rotation, SwiGLU, embedding, the prompt's step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from embedgrad.backends.base import Backend, Heads
from embedgrad.backends.launch_check.case import Case, Tensors, named, normal, poisoned, seeded, wide
from embedgrad.backends.reference import OPS as reference
from embedgrad.backends.triton import OPS as kernels
from embedgrad.maths.optimizer import AdamW
from embedgrad.maths.trust_region import CosineCone

EPS = 1e-6
RULE, REGION = AdamW(weight_decay=0.1), CosineCone(0.95, 0.9, 1.1)
By = Callable[[Backend], Callable[[Tensors, Tensors], None]]


def rms_norm(tokens: int, width: int, dtype: torch.dtype, backward: bool = False) -> Case:
    """x [tokens, width]."""

    def inputs(device: torch.device) -> Tensors:
        g = seeded(device)
        rows = {name: normal(g, tokens, width, dtype=dtype) for name in ("x", "dy", "dx")}
        return {**rows, "w": normal(g, width, dtype=dtype, scale=0.3) + 1}

    def fresh(a: Tensors) -> Tensors:
        return {"dx": a["dx"].clone()} if backward else {"out": poisoned(a["x"])}

    def by(ops: Backend) -> Callable[[Tensors, Tensors], None]:
        def run(a: Tensors, out: Tensors) -> None:
            if backward:
                ops.rms_norm_backward(a["dy"], a["x"], a["w"], EPS, dx=out["dx"])
            else:
                ops.rms_norm(a["x"], a["w"], EPS, out=out["out"])

        return run

    name = "rms_norm_backward" if backward else "rms_norm"
    return _case(name, f"{tokens} x {width}", dtype, {"width": width}, inputs, fresh, by)


def rope(tokens: int, heads: Heads, dtype: torch.dtype, backward: bool = False, normed: bool = False) -> Case:
    """qkv [tokens, (H + 2G) D]; normed: with the norm of each head."""
    h, groups, size = heads

    def inputs(device: torch.device) -> Tensors:
        g = seeded(device)
        angle = normal(g, tokens, size // 2, dtype=torch.float32, scale=3.0)
        found = {name: normal(g, tokens, (h + 2 * groups) * size, dtype=dtype) for name in ("qkv", "raw")}
        found |= {name: normal(g, size, dtype=dtype, scale=0.3) + 1 for name in ("q_norm", "k_norm")}
        return found | {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}

    def fresh(a: Tensors) -> Tensors:
        return {"qkv": a["qkv"].clone()}

    def by(ops: Backend) -> Callable[[Tensors, Tensors], None]:
        def run(a: Tensors, out: Tensors) -> None:
            q_norm, k_norm = (a["q_norm"], a["k_norm"]) if normed else (None, None)
            if backward:
                ops.rope_backward(
                    out["qkv"], a["raw"] if normed else None, a["cos"], a["sin"], heads,
                    q_norm=q_norm, k_norm=k_norm, eps=EPS,
                )  # fmt: skip
            else:
                ops.rope(out["qkv"], a["cos"], a["sin"], heads, q_norm=q_norm, k_norm=k_norm, eps=EPS)

        return run

    name = "rope_backward" if backward else "rope"
    text = f"{tokens} x {h}/{groups} heads of {size}" + " with norms" * normed
    return _case(name, text, dtype, {"head_dim": size}, inputs, fresh, by)


def swiglu(tokens: int, width: int, dtype: torch.dtype, backward: bool = False) -> Case:
    """gate_up [tokens, 2 width]."""

    def inputs(device: torch.device) -> Tensors:
        g = seeded(device)
        return {"gate_up": normal(g, tokens, 2 * width, dtype=dtype), "da": normal(g, tokens, width, dtype=dtype)}

    def fresh(a: Tensors) -> Tensors:
        return {"out": poisoned(a["gate_up"] if backward else a["da"])}

    def by(ops: Backend) -> Callable[[Tensors, Tensors], None]:
        def run(a: Tensors, out: Tensors) -> None:
            if backward:
                ops.swiglu_backward(a["da"], a["gate_up"], out=out["out"])
            else:
                ops.swiglu(a["gate_up"], out=out["out"])

        return run

    name = "swiglu_backward" if backward else "swiglu"
    return _case(name, f"{tokens} x {width}", dtype, {"width": width}, inputs, fresh, by)


def embed(tokens: int, rows: int, width: int, dtype: torch.dtype, backward: bool = False) -> Case:
    """`rows` prompt rows of `width`, shown once each among `tokens` tokens and once more in front of the last."""
    vocabulary = 1000

    def inputs(device: torch.device) -> Tensors:
        g = seeded(device)
        shown = torch.full((tokens,), -1, dtype=torch.int64, device=device)
        shown[:rows] = torch.arange(rows, device=device)
        shown[-1] = 0
        ids = torch.randint(0, vocabulary, (tokens,), generator=g, device=device)
        return {
            "rows": normal(g, rows, width, dtype=torch.float32), "table": normal(g, vocabulary, width, dtype=dtype),
            "dx": normal(g, tokens, width, dtype=dtype), "ids": ids, "shown": shown,
        }  # fmt: skip

    def fresh(a: Tensors) -> Tensors:
        if backward:
            return {"grad": poisoned(a["dx"], rows, width, dtype=wide(a["dx"].dtype))}
        return {"out": poisoned(a["dx"])}

    def by(ops: Backend) -> Callable[[Tensors, Tensors], None]:
        def run(a: Tensors, out: Tensors) -> None:
            if backward:
                ops.embed_backward(a["dx"], a["shown"], grad=out["grad"])
            else:
                ops.embed(a["rows"], a["table"], a["ids"], a["shown"], out=out["out"])

        return run

    name = "embed_backward" if backward else "embed"
    return _case(name, f"{tokens} x {width}, {rows} prompt rows", dtype, {"width": width}, inputs, fresh, by)


def prompt_step(rows: int, width: int) -> Case:
    """One AdamW step of `rows` prompt rows into a cone."""

    def inputs(device: torch.device) -> Tensors:
        g = seeded(device)
        e0, e, m, v, grad = (normal(g, rows, width, dtype=torch.float32) for _ in range(5))
        factors = RULE.factors(3, 0.05).to(device)
        return {"e0": e0, "e": e0 + 0.3 * e, "m": 0.1 * m, "v": (0.1 * v).square(), "g": grad, "factors": factors}

    def fresh(a: Tensors) -> Tensors:
        return {name: a[name].clone() for name in ("e", "m", "v", "g")}

    def by(ops: Backend) -> Callable[[Tensors, Tensors], None]:
        def run(a: Tensors, out: Tensors) -> None:
            e, m, v, g = (out[name] for name in ("e", "m", "v", "g"))
            ops.prompt_step(e, a["e0"], m, v, g, factors=a["factors"], region=REGION, rule=RULE, clip_norm=1.0)
            g.zero_()  # the gradient is used up, each backend in its own way

        return run

    return _case("prompt_step", f"{rows} x {width}", torch.float32, {"width": width}, inputs, fresh, by)


def _case(
    kernel: str, text: str, dtype: torch.dtype, sizes: dict[str, int],
    inputs: Callable[[torch.device], Tensors], fresh: Callable[[Tensors], Tensors], by: By,
) -> Case:  # fmt: skip
    return Case(kernel, f"{text} {named(dtype)}", dtype, sizes, inputs, fresh, by(kernels), by(reference))
