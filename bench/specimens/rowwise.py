"""Specimens of the kernels that walk rows: norms, rotation, SwiGLU, embedding."""

from collections.abc import Callable

import torch
from embedgrad.kernels.embed import embed, embed_backward
from embedgrad.kernels.prompt_step import prompt_step
from embedgrad.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from embedgrad.kernels.rope import rope, rope_backward
from embedgrad.kernels.swiglu import swiglu, swiglu_backward
from torch import Tensor

from bench.capture import Launch
from embedgrad import optimizer
from embedgrad.backends import reference
from embedgrad.trust_region import CosineCone, MeanCosine, TrustRegion

from . import Cost, Specimen, Tensors, Trial
from .shapes import CASES, MODELS, PROMPT_ROWS, TOKENS, Model, poisoned, size, untouched, values

EPS = 1e-6
Op = Callable[..., Tensor]


def _streamed(least: int, extra: int, operations: int) -> Cost:
    """Every element once, and `extra` bytes (weights, indices) asked for by more than one program."""
    return Cost(least, least + extra, operations, operations)


def _norms(m: Model, dtype: torch.dtype) -> list[Specimen]:
    x, y, z = (untouched(TOKENS, m.width, dtype=dtype) for _ in range(3))
    w = untouched(m.width, dtype=dtype)
    n, again = TOKENS * m.width, size(((TOKENS - 1) * m.width, dtype))
    forward = _streamed(size((2 * n + m.width, dtype)), again, 4 * n)
    added = _streamed(size((4 * n + m.width, dtype)), again, 5 * n)
    backward = _streamed(size((4 * n + m.width, dtype)), again, 10 * n)
    return [
        Specimen("rms_norm", m.name, dtype, lambda: rms_norm(x, w, EPS, out=y), lambda _: forward, streaming=True),
        Specimen(
            "add_rms_norm", m.name, dtype, lambda: add_rms_norm(x, z, w, EPS, out=y), lambda _: added,
            streaming=True, in_place=True,
        ),
        Specimen(
            "rms_norm_backward", m.name, dtype, lambda: rms_norm_backward(y, x, w, EPS, dx=z), lambda _: backward,
            streaming=True, in_place=True,
        ),
    ]  # fmt: skip


def _ropes(m: Model, dtype: torch.dtype) -> list[Specimen]:
    heads = (m.heads, m.groups, m.head_dim)
    qkv, raw = (untouched(TOKENS, m.qkv, dtype=dtype) for _ in range(2))
    cos, sin = (untouched(TOKENS, m.head_dim // 2, dtype=torch.float32) for _ in range(2))
    norm = untouched(m.head_dim, dtype=dtype)
    n, angles = TOKENS * (m.heads + m.groups) * m.head_dim, size((TOKENS * m.head_dim, torch.float32))
    norms, least = size((2 * m.head_dim, dtype)), size((2 * n, dtype)) + angles

    def cost(launches: list[Launch], normed: bool, raw: int, operations: int) -> Cost:
        """Programs of one token ask for its angles again, and every program for both norms' weights."""
        programs = launches[0].grid[0]
        again = (programs // TOKENS - 1) * angles + ((programs - 1) * norms if normed else 0)
        return _streamed(least + (norms if normed else 0) + size((raw, dtype)), again, operations)

    with_norm = {"q_norm": norm, "k_norm": norm, "eps": EPS}
    return [
        Specimen("rope", m.name, dtype, lambda: rope(qkv, cos, sin, heads),
                 lambda a: cost(a, False, 0, 3 * n), in_place=True, streaming=True),
        Specimen("rope_backward", m.name, dtype, lambda: rope_backward(qkv, None, cos, sin, heads),
                 lambda a: cost(a, False, 0, 3 * n),
                 in_place=True, streaming=True),
        Specimen("rope+qk_norm", m.name, dtype, lambda: rope(qkv, cos, sin, heads, **with_norm),
                 lambda a: cost(a, True, 0, 7 * n),
                 in_place=True, streaming=True),
        Specimen("rope_backward+qk_norm", m.name, dtype,
                 lambda: rope_backward(qkv, raw, cos, sin, heads, **with_norm),
                 lambda a: cost(a, True, n, 12 * n),
                 in_place=True, streaming=True),
    ]  # fmt: skip


def _swiglus(m: Model, dtype: torch.dtype) -> list[Specimen]:
    both, d_both = (untouched(TOKENS, 2 * m.ffn, dtype=dtype) for _ in range(2))
    one = untouched(TOKENS, m.ffn, dtype=dtype)
    n = TOKENS * m.ffn
    forward = _streamed(size((3 * n, dtype)), 0, 6 * n)
    backward = _streamed(size((5 * n, dtype)), 0, 12 * n)
    return [
        Specimen("swiglu", m.name, dtype, lambda: swiglu(both, out=one), lambda _: forward, streaming=True),
        Specimen("swiglu_backward", m.name, dtype, lambda: swiglu_backward(one, both, out=d_both), lambda _: backward,
                 streaming=True),
    ]  # fmt: skip


def _embeds(m: Model, dtype: torch.dtype) -> list[Specimen]:
    rows, grad = (untouched(PROMPT_ROWS, m.width, dtype=torch.float32) for _ in range(2))
    table, out = untouched(m.vocabulary, m.width, dtype=dtype), untouched(TOKENS, m.width, dtype=dtype)
    ids, shown = _shown(TOKENS, PROMPT_ROWS)
    prompt, text = PROMPT_ROWS * m.width, (TOKENS - PROMPT_ROWS) * m.width
    gather = size((prompt, torch.float32), (text + TOKENS * m.width, dtype), (2 * TOKENS, torch.int64))
    back = size((prompt, dtype), (prompt, torch.float32), (TOKENS, torch.int64))

    def index_reads(launches: list[Launch]) -> int:
        return (launches[0].grid[0] // TOKENS - 1) * size((2 * TOKENS, torch.int64))

    return [
        Specimen("embed", m.name, dtype, lambda: embed(rows, table, ids, shown, out=out),
                 lambda launches: _streamed(gather, index_reads(launches), 0), streaming=True),
        Specimen("embed_backward", m.name, dtype, lambda: embed_backward(out, shown, grad=grad),
                 lambda _: _streamed(back, 0, prompt), streaming=True),
    ]  # fmt: skip


def _shown(tokens: int, k: int) -> tuple[Tensor, Tensor]:
    """ids and prompt_rows [tokens]: the prompt stands at the front, text behind it."""
    ids = torch.arange(tokens) % 1000
    rows = torch.full((tokens,), -1)
    rows[:k] = torch.arange(k)
    return ids, rows


def _prompt_step(m: Model, region: TrustRegion, name: str) -> Specimen:
    e, e0, first, second, g = (untouched(PROMPT_ROWS, m.width, dtype=torch.float32) for _ in range(5))
    cosine, ratio = (untouched(PROMPT_ROWS, dtype=torch.float32) for _ in range(2))
    moved = untouched(PROMPT_ROWS, dtype=torch.bool)
    n = PROMPT_ROWS * m.width
    least = 8 * 4 * n + 9 * PROMPT_ROWS

    def run() -> None:
        prompt_step(
            e, e0, first, second, g, step=1, lr=0.1, region=region.describe(), cosine=cosine, norm_ratio=ratio,
            projected=moved,
        )  # fmt: skip

    def cost(launches: list[Launch]) -> Cost:
        """A second launch, for the region over the whole prompt, reads e and e0 and writes e again."""
        return _streamed(least, (len(launches) - 1) * 3 * 4 * n, 30 * n)

    return Specimen(name, m.name, torch.float32, run, cost, streaming=True, in_place=True)


def specimens() -> list[Specimen]:
    """Every kernel of this family at both models' sizes, in each type."""
    makers = (_norms, _ropes, _swiglus, _embeds)
    rows = [s for maker in makers for m, dtype in CASES for s in maker(m, dtype)]
    cone, mean = CosineCone(0.95, 0.9, 1.1), MeanCosine(0.95)
    steps = [(cone, "prompt_step"), (mean, "prompt_step+mean_cosine")]
    return [*rows, *(_prompt_step(m, region, name) for m in MODELS for region, name in steps)]


def _norm_trials(tokens: int, d: int) -> list[Trial]:
    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        return {name: values(g, tokens, d) for name in ("x", "residual", "dy", "dx")} | {"w": 1 + values(g, d)}

    def forward(a: Tensors, op: Op = rms_norm) -> dict[str, Tensor]:
        return {"out": op(a["x"], a["w"], EPS, out=poisoned(tokens, d, dtype=a["x"].dtype))}

    def added(a: Tensors, op: Op = add_rms_norm) -> dict[str, Tensor]:
        x = a["x"].clone()
        out = op(x, a["residual"], a["w"], EPS, out=poisoned(tokens, d, dtype=x.dtype))
        return {"x": x, "out": out}

    def backward(a: Tensors, op: Op = rms_norm_backward) -> dict[str, Tensor]:
        return {"dx": op(a["dy"], a["x"], a["w"], EPS, dx=a["dx"].clone())}

    case = f"T={tokens} d={d}"
    return [
        Trial("rms_norm", case, inputs, forward, lambda a: forward(a, reference.rms_norm)),
        Trial("add_rms_norm", case, inputs, added, lambda a: added(a, reference.add_rms_norm)),
        Trial("rms_norm_backward", case, inputs, backward, lambda a: backward(a, reference.rms_norm_backward)),
    ]


def _rope_trials(tokens: int, heads: tuple[int, int, int]) -> list[Trial]:
    h, g_heads, d = heads

    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        angle = values(g, tokens, d // 2, scale=3.0)
        wide = {name: values(g, tokens, (h + 2 * g_heads) * d) for name in ("qkv", "raw")}
        norms = {name: 1 + values(g, d, scale=0.3) for name in ("q_norm", "k_norm")}
        return {**wide, **norms, "cos": angle.cos(), "sin": angle.sin()}

    case = f"T={tokens} H={h} G={g_heads} D={d}"

    def trial(name: str, ours: Op, plain: Op, backward: bool, norm: bool) -> Trial:
        def run(a: Tensors, op: Op) -> dict[str, Tensor]:
            extra = {"q_norm": a["q_norm"], "k_norm": a["k_norm"], "eps": EPS} if norm else {}
            before = ((a["raw"] if norm else None),) if backward else ()
            return {"qkv": op(a["qkv"].clone(), *before, a["cos"], a["sin"], heads, **extra)}

        return Trial(
            name + "+qk_norm" * norm, case, inputs, lambda a: run(a, ours), lambda a: run(a, plain)
        )  # fmt: skip

    return [
        trial(name, ours, plain, backward, norm)
        for norm in (False, True)
        for name, ours, plain, backward in (
            ("rope", rope, reference.rope, False),
            ("rope_backward", rope_backward, reference.rope_backward, True),
        )
    ]


def _swiglu_trials(tokens: int, ffn: int) -> list[Trial]:
    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        return {"gate_up": values(g, tokens, 2 * ffn, scale=2.0), "da": values(g, tokens, ffn)}

    def forward(a: Tensors, op: Op = swiglu) -> dict[str, Tensor]:
        return {"out": op(a["gate_up"], out=poisoned(tokens, ffn, dtype=a["da"].dtype))}

    def backward(a: Tensors, op: Op = swiglu_backward) -> dict[str, Tensor]:
        out = poisoned(tokens, 2 * ffn, dtype=a["da"].dtype)
        return {"out": op(a["da"], a["gate_up"], out=out)}

    case = f"T={tokens} F={ffn}"
    return [
        Trial("swiglu", case, inputs, forward, lambda a: forward(a, reference.swiglu)),
        Trial("swiglu_backward", case, inputs, backward, lambda a: backward(a, reference.swiglu_backward)),
    ]


def _embed_trials(tokens: int, k: int, d: int, vocabulary: int) -> list[Trial]:
    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        rows = torch.randint(-1, k, (tokens,), generator=g)
        ids = torch.randint(0, vocabulary, (tokens,), generator=g)
        table, dx = values(g, vocabulary, d), values(g, tokens, d)
        return {"rows": values(g, k, d), "table": table, "dx": dx, "ids": ids, "prompt_rows": rows}

    def forward(a: Tensors, op: Op = embed) -> dict[str, Tensor]:
        out = poisoned(tokens, d, dtype=a["table"].dtype)
        return {"out": op(a["rows"], a["table"], a["ids"], a["prompt_rows"], out=out)}

    def backward(a: Tensors, op: Op = embed_backward) -> dict[str, Tensor]:
        wide = torch.float64 if a["dx"].dtype == torch.float64 else torch.float32
        return {"grad": op(a["dx"], a["prompt_rows"], grad=poisoned(k, d, dtype=wide))}

    case = f"T={tokens} k={k} d={d}"
    return [
        Trial("embed", case, inputs, forward, lambda a: forward(a, reference.embed)),
        Trial("embed_backward", case, inputs, backward, lambda a: backward(a, reference.embed_backward)),
    ]


def _prompt_step_trial(k: int, d: int, region: TrustRegion, name: str) -> Trial:
    def inputs(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        e0 = values(g, k, d)
        found = {"e": e0 + 0.3 * values(g, k, d), "e0": e0, "m": values(g, k, d, scale=0.1), "g": values(g, k, d)}
        return found | {"v": values(g, k, d, scale=0.1).square()}

    def kernel(a: Tensors) -> dict[str, Tensor]:
        e, m, v = (a[n].clone() for n in ("e", "m", "v"))
        cosine, ratio = poisoned(k, dtype=torch.float32), poisoned(k, dtype=torch.float32)
        prompt_step(
            e, a["e0"], m, v, a["g"], step=3, lr=0.05, weight_decay=0.1, region=region.describe(), cosine=cosine,
            norm_ratio=ratio, projected=torch.empty(k, dtype=torch.bool),
        )  # fmt: skip
        return {"e": e, "m": m, "v": v, "cosine": cosine, "norm_ratio": ratio}

    def plain(a: Tensors) -> dict[str, Tensor]:
        e, m, v = (a[n].clone() for n in ("e", "m", "v"))
        report = optimizer.prompt_step(e, a["e0"], m, v, a["g"], step=3, lr=0.05, weight_decay=0.1, region=region)
        return {"e": e, "m": m, "v": v, "cosine": report.similarity, "norm_ratio": report.norm_ratio}

    return Trial(name, f"k={k} d={d}", inputs, kernel, plain, types=(torch.float32,))


def trials() -> list[Trial]:
    """Each kernel at sizes that divide nothing, at size 1, and at a model's own row width."""
    norms = [t for shape in ((3, 77), (1, 1), (4, 1536)) for t in _norm_trials(*shape)]
    ropes = [t for shape in ((5, (3, 1, 16)), (2, (12, 2, 128)), (1, (1, 1, 80))) for t in _rope_trials(*shape)]
    gates = [t for shape in ((3, 77), (1, 1), (2, 1100)) for t in _swiglu_trials(*shape)]
    gathers = [t for shape in ((9, 3, 77, 11), (1, 1, 1, 1), (6, 2, 600, 5)) for t in _embed_trials(*shape)]
    cone, mean = CosineCone(0.95, 0.9, 1.1), MeanCosine(0.95)
    steps = [_prompt_step_trial(k, d, cone, "prompt_step") for k, d in ((5, 77), (1, 1), (2, 576))]
    return [*norms, *ropes, *gates, *gathers, *steps, _prompt_step_trial(5, 77, mean, "prompt_step+mean_cosine")]
