"""Operations on rows: norms, rotation, SwiGLU, embedding, the prompt's step."""

from typing import Any

import torch
from torch import Tensor

from bench.machine_code.capture import Launch
from bench.machine_code.specimens.base import Cost, Specimen, Tensors, Trial
from bench.machine_code.specimens.shapes import (
    CASES,
    MODELS,
    PROMPT_ROWS,
    TOKENS,
    Model,
    poisoned,
    size,
    untouched,
    values,
    wide,
)
from embedgrad.backends.base import Backend, CacheRows, Heads
from embedgrad.backends.triton import OPS
from embedgrad.maths.optimizer import AdamW
from embedgrad.maths.trust_region import CosineCone, MeanCosine, TrustRegion

EPS = 1e-6
STEPS: tuple[tuple[str, TrustRegion], ...] = (
    ("prompt_step", CosineCone(0.95, 0.9, 1.1)),
    ("prompt_step+mean_cosine", MeanCosine(0.95)),
)
RULE = AdamW(weight_decay=0.1)


def _streamed(least: int, extra: int, operations: int) -> Cost:
    """Every element once, and `extra` bytes (weights, indices) that more than one program asks for."""
    return Cost(least, least + extra, operations, operations)


def _norms(m: Model, dtype: torch.dtype) -> list[Specimen]:
    x, y, z = (untouched(TOKENS, m.width, dtype=dtype) for _ in range(3))
    w = untouched(m.width, dtype=dtype)
    n, again = TOKENS * m.width, size(((TOKENS - 1) * m.width, dtype))
    forward = _streamed(size((2 * n + m.width, dtype)), again, 4 * n)
    backward = _streamed(size((4 * n + m.width, dtype)), again, 10 * n)
    return [
        Specimen("rms_norm", m.name, dtype, lambda: OPS.rms_norm(x, w, EPS, out=y), lambda _: forward, streaming=True),
        Specimen("rms_norm_backward", m.name, dtype, lambda: OPS.rms_norm_backward(y, x, w, EPS, dx=z),
                 lambda _: backward, streaming=True, in_place=True),
    ]  # fmt: skip


def _ropes(m: Model, dtype: torch.dtype) -> list[Specimen]:
    heads: Heads = (m.heads, m.kv_heads, m.head_dim)
    qkv, raw = (untouched(TOKENS, m.qkv, dtype=dtype) for _ in range(2))
    cos, sin = (untouched(TOKENS, m.head_dim // 2, dtype=torch.float32) for _ in range(2))
    norm = untouched(m.head_dim, dtype=dtype)
    n, angles = TOKENS * (m.heads + m.kv_heads) * m.head_dim, size((TOKENS * m.head_dim, torch.float32))
    norms, least = size((2 * m.head_dim, dtype)), size((2 * n, dtype)) + angles

    def specimen(backward: bool, normed: bool) -> Specimen:
        options: dict[str, Any] = {"q_norm": norm, "k_norm": norm, "eps": EPS} if normed else {}

        def run() -> None:
            if backward:
                OPS.rope_backward(qkv, raw if normed else None, cos, sin, heads, **options)
            else:
                OPS.rope(qkv, cos, sin, heads, **options)

        def cost(launches: list[Launch]) -> Cost:
            """Each program of a token asks for the token's angles, and each program for the weights of both norms."""
            programs = launches[0].grid[0]
            again = (programs // TOKENS - 1) * angles + ((programs - 1) * norms if normed else 0)
            read = size((n, dtype)) if backward and normed else 0
            operations = (12 if backward else 7) if normed else 3
            return _streamed(least + (norms if normed else 0) + read, again, operations * n)

        op = "rope" + "_backward" * backward + "+qk_norm" * normed
        return Specimen(op, m.name, dtype, run, cost, in_place=True, streaming=True)

    keys, values = (untouched(TOKENS, m.kv_heads, m.head_dim, dtype=dtype) for _ in range(2))
    cache = CacheRows(keys, values, untouched(TOKENS, dtype=torch.int64))

    def store_cost(launches: list[Launch]) -> Cost:
        """As without a cache; the values are read, keys and values stored once more, and slots read."""
        stored = size((3 * keys.numel(), dtype), (TOKENS, torch.int64))
        again = (launches[0].grid[0] // TOKENS - 1) * angles
        return _streamed(least + stored, again, 3 * n)

    storing = Specimen(
        "rope_and_store", m.name, dtype, lambda: OPS.rope_and_store(qkv, cos, sin, heads, cache), store_cost,
        in_place=True, streaming=True,
    )  # fmt: skip
    return [*(specimen(backward, normed) for normed in (False, True) for backward in (False, True)), storing]


def _swiglus(m: Model, dtype: torch.dtype) -> list[Specimen]:
    both, d_both = (untouched(TOKENS, 2 * m.ffn, dtype=dtype) for _ in range(2))
    one = untouched(TOKENS, m.ffn, dtype=dtype)
    n = TOKENS * m.ffn
    forward = _streamed(size((3 * n, dtype)), 0, 6 * n)
    backward = _streamed(size((5 * n, dtype)), 0, 12 * n)
    return [
        Specimen("swiglu", m.name, dtype, lambda: OPS.swiglu(both, out=one), lambda _: forward, streaming=True),
        Specimen("swiglu_backward", m.name, dtype, lambda: OPS.swiglu_backward(one, both, out=d_both),
                 lambda _: backward, streaming=True),
    ]  # fmt: skip


def _embeds(m: Model, dtype: torch.dtype) -> list[Specimen]:
    rows, grad = (untouched(PROMPT_ROWS, m.width, dtype=torch.float32) for _ in range(2))
    table, out = untouched(m.vocabulary, m.width, dtype=dtype), untouched(TOKENS, m.width, dtype=dtype)
    ids, shown = torch.arange(TOKENS) % 1000, torch.full((TOKENS,), -1)
    shown[:PROMPT_ROWS] = torch.arange(PROMPT_ROWS)  # the prompt stands in front of the text
    prompt, text = PROMPT_ROWS * m.width, (TOKENS - PROMPT_ROWS) * m.width
    gather = size((prompt, torch.float32), (text + TOKENS * m.width, dtype), (2 * TOKENS, torch.int64))
    back = size((prompt, dtype), (prompt, torch.float32), (TOKENS, torch.int64))

    def index_reads(launches: list[Launch]) -> int:
        return (launches[0].grid[0] // TOKENS - 1) * size((2 * TOKENS, torch.int64))

    return [
        Specimen("embed", m.name, dtype, lambda: OPS.embed(rows, table, ids, shown, out=out),
                 lambda launches: _streamed(gather, index_reads(launches), 0), streaming=True),
        Specimen("embed_backward", m.name, dtype, lambda: OPS.embed_backward(out, shown, grad=grad),
                 lambda _: _streamed(back, 0, prompt), streaming=True),
    ]  # fmt: skip


def _prompt_step(m: Model, op: str, region: TrustRegion) -> Specimen:
    e, e0, first, second, g = (untouched(PROMPT_ROWS, m.width, dtype=torch.float32) for _ in range(5))
    n = e.numel()
    least = 11 * 4 * n + 17 * PROMPT_ROWS  # e, m, v read, written and kept; e0, g read; what the step reports

    def run() -> None:
        OPS.prompt_step(e, e0, first, second, g, factors=RULE.factors(1, 0.1), region=region, rule=RULE, clip_norm=1.0)

    def cost(launches: list[Launch]) -> Cost:
        """The gradient's norm reads g first. A region over the whole prompt reads e and e0, and writes e, once more."""
        whole = any(launch.name == "prompt_mean_cosine_kernel" for launch in launches)
        return _streamed(least, (4 if whole else 1) * 4 * n, 30 * n)

    helpers = ("prompt_settle_kernel",)
    return Specimen(op, m.name, torch.float32, run, cost, streaming=True, in_place=True, helpers=helpers)


def specimens() -> list[Specimen]:
    """Every kernel of this family at both models' sizes, in each type."""
    makers = (_norms, _ropes, _swiglus, _embeds)
    rows = [s for maker in makers for m, dtype in CASES for s in maker(m, dtype)]
    return [*rows, *(_prompt_step(m, op, region) for m in MODELS for op, region in STEPS)]


def _norm_trials(tokens: int, d: int) -> list[Trial]:
    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        return {name: values(g, tokens, d) for name in ("x", "dy", "dx")} | {"w": 1 + values(g, d)}

    def forward(ops: Backend, a: Tensors) -> dict[str, Tensor]:
        return {"out": ops.rms_norm(a["x"], a["w"], EPS, out=poisoned(tokens, d, dtype=a["x"].dtype))}

    def backward(ops: Backend, a: Tensors) -> dict[str, Tensor]:
        return {"dx": ops.rms_norm_backward(a["dy"], a["x"], a["w"], EPS, dx=a["dx"].clone())}

    case = f"T={tokens} d={d}"
    return [Trial("rms_norm", case, inputs, forward), Trial("rms_norm_backward", case, inputs, backward)]


def _rope_trials(tokens: int, heads: Heads) -> list[Trial]:
    h, g_heads, d = heads

    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        angle = values(g, tokens, d // 2, scale=3.0)
        rows = {name: values(g, tokens, (h + 2 * g_heads) * d) for name in ("qkv", "raw")}
        norms = {name: 1 + values(g, d, scale=0.3) for name in ("q_norm", "k_norm")}
        return {**rows, **norms, "cos": angle.cos(), "sin": angle.sin()}

    def trial(backward: bool, normed: bool) -> Trial:
        def run(ops: Backend, a: Tensors) -> dict[str, Tensor]:
            options: dict[str, Any] = {"q_norm": a["q_norm"], "k_norm": a["k_norm"], "eps": EPS} if normed else {}
            qkv, angles = a["qkv"].clone(), (a["cos"], a["sin"])
            if backward:
                return {"qkv": ops.rope_backward(qkv, a["raw"] if normed else None, *angles, heads, **options)}
            return {"qkv": ops.rope(qkv, *angles, heads, **options)}

        op = "rope" + "_backward" * backward + "+qk_norm" * normed
        return Trial(op, f"T={tokens} H={h} G={g_heads} D={d}", inputs, run)

    def store(ops: Backend, a: Tensors) -> dict[str, Tensor]:
        keys, kept = (torch.zeros(tokens + 2, g_heads, d, dtype=a["qkv"].dtype) for _ in range(2))
        slots = torch.arange(tokens, 0, -1)
        qkv = ops.rope_and_store(
            a["qkv"].clone(), a["cos"], a["sin"], heads, CacheRows(keys, kept, slots),
            q_norm=a["q_norm"], k_norm=a["k_norm"], eps=EPS,
        )  # fmt: skip
        return {"qkv": qkv, "keys": keys, "values": kept}

    case = f"T={tokens} H={h} G={g_heads} D={d}"
    storing = Trial("rope_and_store+qk_norm", case, inputs, store)
    return [*(trial(backward, normed) for normed in (False, True) for backward in (False, True)), storing]


def _swiglu_trials(tokens: int, ffn: int) -> list[Trial]:
    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        return {"gate_up": values(g, tokens, 2 * ffn, scale=2.0), "da": values(g, tokens, ffn)}

    def forward(ops: Backend, a: Tensors) -> dict[str, Tensor]:
        return {"out": ops.swiglu(a["gate_up"], out=poisoned(tokens, ffn, dtype=a["da"].dtype))}

    def backward(ops: Backend, a: Tensors) -> dict[str, Tensor]:
        out = poisoned(tokens, 2 * ffn, dtype=a["da"].dtype)
        return {"out": ops.swiglu_backward(a["da"], a["gate_up"], out=out)}

    case = f"T={tokens} F={ffn}"
    return [Trial("swiglu", case, inputs, forward), Trial("swiglu_backward", case, inputs, backward)]


def _embed_trials(tokens: int, k: int, d: int, vocabulary: int) -> list[Trial]:
    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        rows = torch.randint(-1, k, (tokens,), generator=g)
        ids = torch.randint(0, vocabulary, (tokens,), generator=g)
        table, dx = values(g, vocabulary, d), values(g, tokens, d)
        return {"rows": values(g, k, d), "table": table, "dx": dx, "ids": ids, "prompt_rows": rows}

    def forward(ops: Backend, a: Tensors) -> dict[str, Tensor]:
        out = poisoned(tokens, d, dtype=a["table"].dtype)
        return {"out": ops.embed(a["rows"], a["table"], a["ids"], a["prompt_rows"], out=out)}

    def backward(ops: Backend, a: Tensors) -> dict[str, Tensor]:
        return {"grad": ops.embed_backward(a["dx"], a["prompt_rows"], grad=poisoned(k, d, dtype=wide(a["dx"].dtype)))}

    case = f"T={tokens} k={k} d={d}"
    return [Trial("embed", case, inputs, forward), Trial("embed_backward", case, inputs, backward)]


def _prompt_step_trial(k: int, d: int, op: str, region: TrustRegion) -> Trial:
    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        e0 = values(g, k, d)
        found = {"e": e0 + 0.3 * values(g, k, d), "e0": e0, "m": values(g, k, d, scale=0.1), "g": values(g, k, d)}
        return found | {"v": values(g, k, d, scale=0.1).square()}

    def run(ops: Backend, a: Tensors) -> dict[str, Tensor]:
        e, m, v, g = (a[n].clone() for n in ("e", "m", "v", "g"))
        report = ops.prompt_step(
            e, a["e0"], m, v, g, factors=RULE.factors(3, 0.05), region=region, rule=RULE, clip_norm=1.0
        )
        told = {"cosine": report.similarity, "norm_ratio": report.norm_ratio, "gradient_norm": report.gradient_norm}
        return {"e": e, "m": m, "v": v, **told}

    # The report is float64, computed from float32 rows.
    return Trial(op, f"k={k} d={d}", inputs, run, tolerance={torch.float64: 1e-6}, types=(torch.float32,))


def trials() -> list[Trial]:
    """Each kernel at sizes that divide nothing, at size 1, and at a model's own row width."""
    cone, mean = STEPS
    return [
        *(t for shape in ((3, 77), (1, 1), (4, 1536)) for t in _norm_trials(*shape)),
        *(t for shape in ((5, (3, 1, 16)), (2, (12, 2, 128)), (1, (1, 1, 80))) for t in _rope_trials(*shape)),
        *(t for shape in ((3, 77), (1, 1), (2, 1100)) for t in _swiglu_trials(*shape)),
        *(t for shape in ((9, 3, 77, 11), (1, 1, 1, 1), (6, 2, 600, 5)) for t in _embed_trials(*shape)),
        *(_prompt_step_trial(k, d, *cone) for k, d in ((5, 77), (1, 1), (2, 576))),
        _prompt_step_trial(5, 77, *mean),
    ]
