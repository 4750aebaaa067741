"""What does the host do for one step, one decoded token and one prefill on a GPU, and in how many launches?

No GPU is needed. The model has the shape of Qwen2.5-Math-1.5B, bfloat16, on tensors without memory, and no kernel is
launched (`bench/harness/unlaunched.py`). So the counts are those of a GPU, and the seconds are those of the project's
own Python by the processor's clock: without Triton's launcher, cuBLAS and the driver, whose time for each launch comes
on top.

A step is `PromptTrainer.prepare` and `launch`: pack the tree, make the attention's work lists, send both, forward,
loss, backward, the prompt's step. "graph" is the same step where it is replayed as one CUDA graph. "score" goes forward
only. "decode" is one new token behind a prompt of 190, "prefill" the same prompt and the queries behind it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

import embedgrad
from bench.harness.arguments import positive
from bench.harness.contenders import Case, task
from bench.harness.markdown import table
from bench.harness.models import QWEN_1_5B, config_of
from bench.harness.rows import Row, row
from bench.harness.stopwatch import Stopwatch, replaced
from bench.harness.unlaunched import META, TorchCalls, launches, model_without_memory, nothing_computed
from embedgrad.backends.triton import Triton
from embedgrad.engine import gradient, memory, packed_pass, prompt_trainer, runner
from embedgrad.engine.attention import Attention
from embedgrad.engine.decoder import Decoder
from embedgrad.engine.mlp import Mlp
from embedgrad.engine.model import Model
from embedgrad.engine.packed_pass import PackedPass
from embedgrad.engine.prompt_trainer import PromptTrainer
from embedgrad.engine.runner import PassRunner
from embedgrad.engine.tree import build_tree, prepare
from embedgrad.generation import prefill
from embedgrad.generation.kv_cache import KeyValueCache
from embedgrad.maths.optimizer import AdamW
from embedgrad.maths.trust_region import CosineCone
from embedgrad.model.frozen import FrozenMatrix
from embedgrad.prompt.rendering import Rendered, render
from embedgrad.util.host import Parcel

CHECKS = ("tests/bench/test_host.py", "tests/engine/test_runner.py::test_a_replayed_step_is_the_plain_one")
SHAPES = ("64/64/8", "200/50/32", "512/120/64")
POLICIES = ("all", "layer")
QUERIES = (1, 32)
PROMPT_TOKENS, QUERY_TOKENS = 190, 20
ARCHITECTURES, ARCH = ("sm_80", "sm_90", "sm_100", "gfx942"), "sm_90"
CLOCK = time.thread_time  # what the host's thread has worked, whoever else is on the machine
BUDGET = 1 << 40  # bytes of activations; none are taken

# Parts of a step, in the order in which they are shown; a part that another one calls counts by itself.
PARTS: tuple[tuple[Any, str, str], ...] = (
    (prompt_trainer, "build_tree", "pack the tree"),
    (prefill, "pack_branches", "pack the tree"),
    (runner, "host_pass", "masks and work lists"),
    (packed_pass, "host_pass", "masks and work lists"),
    (Parcel, "fill", "collect what is sent"),
    (Decoder, "embed", "embedding"),
    (Attention, "forward", "attention"),
    (Mlp, "gate_up", "MLP"),
    (Mlp, "forward", "MLP"),
    (Decoder, "final_norm", "last norm and loss"),
    (gradient, "target_loss", "last norm and loss"),
    (KeyValueCache, "logits", "logits"),
    (Attention, "backward", "attention, backward"),
    (Mlp, "backward", "MLP, backward"),
    (Triton, "embed_backward", "prompt's step"),
    (Triton, "prompt_step", "prompt's step"),
)
OTHER = "everything else"
ON_HOST = ("plan_attention",)  # of the backend's methods, those that launch nothing
LAUNCHERS, PRODUCTS = "launchers", "products"
Act = Callable[[], object]


@dataclass(frozen=True)
class Job:
    """Something that the host does: what it is called, and `act`, which does it once."""

    case: dict[str, int | float | str]
    act: Act


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    parser.add_argument(
        "--shapes", nargs="*", type=Case.told, default=None, help=f"prompt/query/batch (default: {' '.join(SHAPES)})"
    )
    parser.add_argument(
        "--policies", nargs="*", choices=memory.POLICIES, default=list(POLICIES), help="default: all layer"
    )
    parser.add_argument("--repeats", type=positive, default=9, help="how often each is done (default 9)")
    parser.add_argument("--arch", choices=ARCHITECTURES, default=ARCH, help=f"whose launch parameters (default {ARCH})")


def main(args: argparse.Namespace) -> list[Row]:
    """Count and measure; the rows."""
    torch.set_num_threads(1)
    model = model_without_memory(config_of(QWEN_1_5B, 4 if args.quick else None), QWEN_1_5B)
    shapes = args.shapes or (SHAPES[:1] if args.quick else SHAPES)
    repeats = 3 if args.quick else args.repeats
    found = []
    for job in jobs(model, shapes, args.policies, QUERIES[:1] if args.quick else QUERIES):
        one = measured(job, repeats, args.arch, model)
        kernels, torchs = sum(one.more["launches"].values()), one.more["torch"]
        print(f"{_title(one)}: {one.median * 1e3:.1f} ms, {kernels} launches of ours, {torchs}", flush=True)
        found.append(one)
    return found


def jobs(model: Model, shapes: Sequence[str], policies: Sequence[str], queries: Sequence[int]) -> Iterator[Job]:
    """All that is asked of `model`, one after the other."""
    for shape in shapes:
        for policy in policies:
            yield Job({"what": "step", "shape": shape, "policy": policy}, step(model, Case.parse(shape), policy))
        yield Job({"what": "graph", "shape": shape, "policy": "all"}, step(model, Case.parse(shape), "all", graph=True))
        yield Job({"what": "score", "shape": shape, "policy": "none"}, scoring(model, Case.parse(shape)))
    for count in queries:
        yield Job({"what": "decode", "queries": count}, decoding(model, count))
        yield Job({"what": "prefill", "queries": count}, filling(model, count))


def step(model: Model, case: Case, policy: str, *, graph: bool = False) -> Act:
    """A training step on padded passes, as on a GPU; with `graph` one whose launches are replayed."""
    soft, examples = task(model, case)
    batch = prepare([render(model, soft, example) for example in examples]), [1.0] * len(examples)
    e = soft.embeddings.float()
    trainer = PromptTrainer(
        model, (e, torch.zeros_like(e), torch.zeros_like(e)), soft.anchor.float(), [batch],
        region=CosineCone(0.95), rule=AdamW(), clip_norm=1.0, policy=policy, memory_budget=BUDGET, static=True,
        capture=_captured_once if graph else None,
    )  # fmt: skip
    number = 0

    def act() -> None:
        nonlocal number
        number += 1
        trainer.launch(trainer.prepare(batch), number, 1e-3)

    return act


def _captured_once(launch: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Stands in for a CUDA graph: replaying it costs nothing here."""
    return lambda: None, launch()


def scoring(model: Model, case: Case) -> Act:
    """Forward only, as validation goes."""
    soft, examples = task(model, case)
    sequences = prepare([render(model, soft, example) for example in examples])
    e = soft.embeddings.to(META)

    def body(p: PackedPass, policy: str | None) -> Tensor:
        hidden = model.decoder.forward(e, p, policy)
        return gradient.target_loss(model.decoder, model.weights.head, hidden, p.targets, differentiate=False)[0]

    passes = PassRunner(model, body, [build_tree(sequences)], policy=None, static=True)
    return lambda: passes.launch(passes.prepare(prompt_trainer.build_tree(sequences)))


def _queries(model: Model, count: int) -> tuple[Tensor, list[Rendered]]:
    soft, examples = task(model, Case(PROMPT_TOKENS, QUERY_TOKENS, count))
    return soft.embeddings.to(META), [render(model, soft, example) for example in examples]


def decoding(model: Model, count: int) -> Act:
    """One new token for each of `count` queries: hidden states and logits."""
    embeddings, sequences = _queries(model, count)
    model.release_memory()
    with launches(ARCH), nothing_computed():
        prefix = prefill.prefill_prefix(model, embeddings, sequences[0], PROMPT_TOKENS)
        cache, _ = prefill.prefill_suffixes(model, embeddings, sequences, prefix)
    ids, mark = torch.empty(count, dtype=torch.int64, device=META), cache.mark()

    def act() -> None:
        cache.rewind(mark)
        cache.next_logits(ids)

    return act


def filling(model: Model, count: int) -> Act:
    """Keys and values of the prompt, and of `count` queries behind it, and their first logits."""
    embeddings, sequences = _queries(model, count)

    def act() -> None:
        model.release_memory()
        prefix = prefill.prefill_prefix(model, embeddings, sequences[0], PROMPT_TOKENS)
        prefill.prefill_suffixes(model, embeddings, sequences, prefix)

    return act


def counted(act: Act, arch: str = ARCH) -> tuple[dict[str, int], TorchCalls]:
    """What one `act` launches, after the first two: launches of each kernel of ours, and torch's operations."""
    with launches(arch) as kernels:
        with nothing_computed():
            act()
            act()
        kernels.clear()
        with TorchCalls() as calls:
            act()
    return dict(kernels.most_common()), calls


def measured(job: Job, repeats: int, arch: str, model: Model) -> Row:
    """The row of a job: seconds without a stopwatch, seconds of parts with one, counts in a turn of their own."""
    kernels, calls = counted(job.act, arch)
    totals, parts = [], []
    with launches(arch), nothing_computed():
        for _ in range(repeats):
            started = CLOCK()
            job.act()
            totals.append(CLOCK() - started)
        for _ in range(repeats):
            watch = Stopwatch(clock=CLOCK)
            with _watching(watch):
                watch.part(OTHER, job.act)()
            parts.append(watch.seconds)
    spent: dict[str, dict[str, float]] = defaultdict(dict)
    for part, name in dict.fromkeys(key for each in parts for key in each):
        spent[part][name or "python"] = statistics.median(each.get((part, name), 0.0) for each in parts)
    order = [*dict.fromkeys(name for *_, name in PARTS), OTHER]
    return row(
        "host", "embedgrad", f"embedgrad {embedgrad.__version__}, backend triton", totals,
        case={**job.case, "model": model.name, "layers": model.config.num_layers, "weights": "bf16", "arch": arch},
        launches=kernels, torch=dict(calls.count), others=dict(calls.others.most_common()),
        parts={name: spent[name] for name in order if name in spent},
    )  # fmt: skip


@contextmanager
def _watching(watch: Stopwatch) -> Iterator[None]:
    """Inside, the time of parts, of the backend's operations and of the products is taken."""
    with ExitStack() as stack:

        def put(owner: Any, name: str, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]], to: str) -> None:
            stack.enter_context(replaced(owner, name, wrap(to, vars(owner)[name])))

        for name, found in [*vars(Triton).items()]:
            if callable(found) and not name.startswith("_") and not name.endswith("_bytes") and name not in ON_HOST:
                put(Triton, name, watch.timed, LAUNCHERS)
        for name in ("forward", "backward"):
            put(FrozenMatrix, name, watch.timed, PRODUCTS)
        for owner, name, part in PARTS:
            put(owner, name, watch.part, part)
        yield


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _title(one: Row) -> str:
    case = one.case
    if case["what"] in ("decode", "prefill"):
        return f"{case['what']}, {case['queries']} quer{'y' if case['queries'] == 1 else 'ies'}"
    return f"{case['what']} {case['shape']}, policy `{case['policy']}`"


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`host`: launches and milliseconds; `host-parts`: milliseconds by part; `host-launches`: kernels by name."""
    heads = ("", "launches of ours", "torch's products", "torch's other launches", "views", "ms", "20..80 %")
    cells: list[Sequence[object]] = []
    for one in rows:
        count = cast(dict[str, int], one.more["torch"])
        cells.append((
            _title(one), sum(one.more["launches"].values()), *(count.get(n, 0) for n in ("product", "other", "view")),
            f"{one.median * 1e3:.1f}", f"{one.low * 1e3:.1f}..{one.high * 1e3:.1f}",
        ))  # fmt: skip
    return {"host": table(heads, cells), "host-parts": _parts(rows), "host-launches": _kernels(rows)}


def _parts(rows: Sequence[Row]) -> str:
    shown = [one for one in rows if one.case.get("policy") != "layer"]
    names = list(dict.fromkeys(name for one in shown for name in one.more["parts"]))
    order = [name for name in [*dict.fromkeys(part for *_, part in PARTS), OTHER] if name in names]
    cells = []
    for one in shown:
        parts = one.more["parts"]
        launchers, products = (sum(part.get(kind, 0.0) for part in parts.values()) for kind in (LAUNCHERS, PRODUCTS))
        each = (f"{sum(parts[name].values()) * 1e3:.2f}" if name in parts else None for name in order)
        cells.append((_title(one), *each, f"{launchers * 1e3:.2f}", f"{products * 1e3:.2f}"))
    return table(("ms", *order, "of all: our launchers", "around products"), cells)


def _kernels(rows: Sequence[Row]) -> str:
    wanted = ("step", "score", "decode", "prefill")
    chosen = {_title(one): one.more["launches"] for one in rows if one.case["what"] in wanted}
    first: dict[str, dict[str, int]] = {}
    for title, found in chosen.items():  # a shape changes no count
        if found not in first.values():
            first[title] = found
    names = list(dict.fromkeys(name for found in first.values() for name in found))
    return table(("kernel", *first), [(name, *(found.get(name) for found in first.values())) for name in names])


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """None; the tables show it."""
    return {}
