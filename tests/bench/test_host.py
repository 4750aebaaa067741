"""How many launches the host of a GPU makes: figures that must not grow. And what `bench host` says about them.

Each table has the launches of one layer between the first and the last, and those of everything else together (what
first and last layer do otherwise, both ends of the model, the loss, the prompt's step). Fewer launches: put the new
figures here, and run `python -m bench host`, so that docs/performance.md shows them. More launches need a reason that
is worth their time, which is 10 to 100 µs of the host each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest
import torch

from bench import host
from bench.harness import unlaunched
from bench.harness.contenders import Case
from bench.harness.models import QWEN_1_5B, config_of
from bench.harness.stopwatch import REST, Stopwatch
from embedgrad.engine.model import Model

Launches = dict[str, int]
PRODUCT, OTHER = "torch: product", "torch: other"

STEP_PER_LAYER: Launches = {
    "rms_norm": 2, "rope": 1 + 1, "tree_attention_forward": 1, "swiglu": 1, PRODUCT: 4 + 4,  # forward + backward
    "rms_norm_backward": 2, "tree_attention_rows": 1, "tree_attention_dq": 1, "tree_attention_dkv": 1,
    "tree_attention_reduce": 1, "swiglu_backward": 1,
}  # fmt: skip
STEP_ONCE: Launches = {
    "embed": 1, "rms_norm": 1, "rope": 2, "softmax_loss": 1, "rms_norm_backward": 1, "tree_attention_rows": 1,
    "embed_backward": 1, "prompt_squares": 1, "prompt_step": 1, "prompt_settle": 1, PRODUCT: 4, OTHER: 45,
}  # fmt: skip
# What the policy "layer" computes again in the backward pass.
AGAIN_PER_LAYER: Launches = {"rms_norm": 2, "rope": 1, "tree_attention_forward": 1, PRODUCT: 3}
AGAIN_ONCE: Launches = {"rope": 1, PRODUCT: 1, OTHER: 4}
SCORE_PER_LAYER: Launches = {"rms_norm": 2, "rope": 1, "tree_attention_forward": 1, "swiglu": 1, PRODUCT: 4}
SCORE_ONCE: Launches = {"embed": 1, "rms_norm": 1, "rope": 1, "softmax_loss": 1, PRODUCT: 2, OTHER: 11}
DECODE_PER_LAYER: Launches = {
    "rms_norm": 2, "rope": 1, "decode_parts": 1, "decode_merge": 1, "swiglu": 1, PRODUCT: 4, OTHER: 3,
}  # fmt: skip
DECODE_ONCE: Launches = {"embed": 1, "rms_norm": 1, PRODUCT: 1, OTHER: 12}
GRAPH: Launches = {OTHER: 2}  # the step's inputs, and rate and step number; the graph itself is not counted

CASE = Case(64, 64, 8)


@cache
def model(layers: int) -> Model:
    return unlaunched.model_without_memory(config_of(QWEN_1_5B, layers), QWEN_1_5B)


def launched(make: Callable[[Model], host.Act], layers: int) -> Counter[str]:
    kernels, calls = host.counted(make(model(layers)))
    return +Counter({**kernels, PRODUCT: calls.count["product"], OTHER: calls.count["other"]})


def added(*tables: Launches) -> Launches:
    return dict(sum(map(Counter, tables), Counter()))


@pytest.mark.parametrize(("make", "per_layer", "once"), [
    pytest.param(lambda m: host.step(m, CASE, "all"), STEP_PER_LAYER, STEP_ONCE, id="step, policy all"),
    pytest.param(lambda m: host.step(m, CASE, "layer"), added(STEP_PER_LAYER, AGAIN_PER_LAYER),
                 added(STEP_ONCE, AGAIN_ONCE), id="step, policy layer"),
    pytest.param(lambda m: host.scoring(m, CASE), SCORE_PER_LAYER, SCORE_ONCE, id="score"),
    pytest.param(lambda m: host.decoding(m, 8), DECODE_PER_LAYER, DECODE_ONCE, id="decode"),
    pytest.param(lambda m: host.step(m, CASE, "all", graph=True), {}, GRAPH, id="step, as a graph"),
])  # fmt: skip
def test_launches(make: Callable[[Model], host.Act], per_layer: Launches, once: Launches) -> None:
    few, more = launched(make, 3), launched(make, 4)
    layer = more - few
    assert dict(layer) == per_layer, "launches per layer have changed; see the top of this file"
    assert dict(few - Counter({name: 3 * n for name, n in layer.items()})) == once, "launches once a step have changed"


def test_another_shape_changes_no_count() -> None:
    found = [launched(lambda m: host.step(m, Case.parse(shape), "all"), 3) for shape in host.SHAPES]  # noqa: B023
    assert found[0] == found[1] == found[2]


def test_the_rows_say_what_was_done() -> None:
    _, args = host_arguments("--shapes", "8/8/2", "--repeats", "2")
    rows = host.main(args)
    assert [one.case["what"] for one in rows] == ["step", "step", "graph", "score", "decode", "prefill"]
    step = rows[0]
    assert step.more["launches"] == {name: n for name, n in step.more["launches"].items() if n > 0}
    assert {"attention", "MLP", "MLP, backward", "prompt's step", "masks and work lists"} <= step.more["parts"].keys()
    assert all(spent >= 0 for part in step.more["parts"].values() for spent in part.values())
    tables = host.tables(rows)
    assert "step 8/8/2, policy `all`" in tables["host"]
    assert "| rope |" in tables["host-launches"]


def host_arguments(*given: str) -> tuple[object, object]:
    from bench import __main__ as command

    return command.parse(["host", "--quick", *given])


def test_a_stopwatch_counts_inner_calls_for_themselves() -> None:
    watch = Stopwatch()
    inner = watch.timed("op", lambda: sum(range(20_000)))
    middle = watch.part("b", lambda: inner())
    watch.part("a", lambda: (inner(), middle()))()
    assert set(watch.seconds) == {("a", "op"), ("a", REST), ("b", "op"), ("b", REST)}
    assert watch.seconds["b", REST] < watch.seconds["b", "op"]


def test_nothing_is_launched_and_everything_is_put_back() -> None:
    before = torch.mm, torch.addmm, torch.index_select
    with unlaunched.launches("sm_90"), unlaunched.nothing_computed():
        pass
    assert (torch.mm, torch.addmm, torch.index_select) == before
