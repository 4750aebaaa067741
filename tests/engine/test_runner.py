"""Padded passes whose inputs stay in place, run one by one and replayed from a recording, beside plain ones."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from embedgrad.kernels import launch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from embedgrad.data.example import Example
from embedgrad.engine.model import Model, load_model
from embedgrad.engine.packed_pass import PassSize
from embedgrad.engine.prompt_trainer import Batch, PromptTrainer, StepResult
from embedgrad.engine.runner import Capture, GraphWarning
from embedgrad.engine.scorer import Scorer
from embedgrad.engine.size_classes import WASTE, fitting, size_classes
from embedgrad.engine.tree import prepare
from embedgrad.maths.optimizer import AdamW
from embedgrad.maths.trust_region import CosineCone
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import render
from tests.engine.drawn import TEMPLATES, batches, configs, make_prompt, pair, prompts
from tests.model.tiny import write_folder

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
POLICIES = ("all", "mlp", "layer")


def batch_of(model: Model, prompt: SoftPrompt, examples: list[Example]) -> Batch:
    return prepare([render(model, prompt, e) for e in examples]), [e.weight for e in examples]


def trainer(
    model: Model, prompt: SoftPrompt, known: list[Batch], policy: str, capture: Capture | None = None, **options: Any
) -> PromptTrainer:
    e = CosineCone(0.9).project(prompt.embeddings, prompt.anchor)
    state = e.clone(), torch.zeros_like(e), torch.zeros_like(e)
    return PromptTrainer(
        model, state, prompt.anchor, known, region=CosineCone(0.9), rule=AdamW(), clip_norm=1.0, policy=policy,
        memory_budget=None, capture=capture, **options,
    )  # fmt: skip


def step(one: PromptTrainer, batch: Batch, n: int) -> StepResult:
    return one.read(one.launch(one.prepare(batch), n, 2e-2))


def assert_same(plain: PromptTrainer, padded: PromptTrainer, taken: list[Batch]) -> None:
    """Each step, from the same state, comes to the same; the first moment is a share of the gradient."""
    for n, batch in enumerate(taken, start=1):
        padded._state.copy_(plain._state)
        a, b = step(plain, batch, n), step(padded, batch, n)
        assert a.loss == pytest.approx(b.loss, rel=2e-6, abs=1e-6)
        assert float(a.report.gradient_norm) == pytest.approx(float(b.report.gradient_norm), rel=1e-5, abs=1e-7)
        assert torch.equal(a.exact, b.exact)
        assert bool(b.report.alive)
        (_, m, v), (_, other_m, other_v) = plain.state(), padded.state()
        torch.testing.assert_close(other_m, m, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(other_v, v, rtol=1e-4, atol=2e-6)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    config=configs(), drawn=prompts(), drawn_batches=st.lists(batches(), min_size=1, max_size=4),
    policy=st.sampled_from(POLICIES),
)  # fmt: skip
def test_padding_changes_no_step(config: Any, drawn: Any, drawn_batches: list[list[Example]], policy: str) -> None:
    """One class for batches of any size, on the machine's best backend and in every family."""
    model = pair(*config).model
    prompt = make_prompt(model, drawn)
    taken = [batch_of(model, prompt, examples) for examples in drawn_batches]
    plain, static = trainer(model, prompt, taken, policy), trainer(model, prompt, taken, policy, static=True)
    largest = max((static._runner._size(each) for each in map(_tree, taken)), key=lambda size: size.tokens)
    static._runner._sizes = [_larger(largest, [static._runner._size(_tree(each)) for each in taken])]
    assert_same(plain, static, taken)


def _tree(batch: Batch) -> Any:
    from embedgrad.engine.tree import build_tree

    return build_tree(*batch)


def _larger(size: PassSize, others: list[PassSize]) -> PassSize:
    """A class that all fit, padded in every dimension."""
    most = [size, *others]
    return PassSize(
        max(s.tokens for s in most) + 5, max(s.prefix for s in most) + 3, max(s.rows or 0 for s in most) + 2,
        max(s.shown or 0 for s in most) + 3, max(s.targets for s in most) + 4,
    )  # fmt: skip


@pytest.mark.parametrize("weights", ["compute", "int8", "int4", "bf16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_padding_changes_no_score(tmp_path: Path, family: str, weights: str) -> None:
    write_folder(tmp_path, family, **({"sliding_window": 5} if family == "mistral" else {}))
    model = load_model(tmp_path, weights=weights, device="cpu")
    prompt = SoftPrompt.from_ids(model, [9, 30, 200], template=TEMPLATES["after"])
    examples = [Example([10, 11, *range(12, 12 + n)], [20, 21][: 1 + n % 2]) for n in range(5)]
    chunks = [batch_of(model, prompt, examples[:2])[0], batch_of(model, prompt, examples[2:])[0]]
    plain, static = Scorer(model, chunks), Scorer(model, chunks, repeated=True)
    static._runner._static, static._runner._sizes = True, [PassSize(60, 40, 20, None, 20)]
    static._prepared = [[static._runner.prepare(p.tree) for p in chunk] for chunk in static._prepared]
    for _ in range(2):
        for n in range(2):
            one, other = plain.details(prompt.embeddings, n), static.details(prompt.embeddings, n)
            torch.testing.assert_close(one.example_loss, other.example_loss, rtol=1e-5, atol=1e-6)
            assert [len(x) for x in one.token_nll] == [len(x) for x in other.token_nll]
            assert torch.equal(one.exact, other.exact)


class Recording(TorchDispatchMode):
    """Stands in for a CUDA graph: what is launched is noted, and done again on the same tensors when it is replayed."""

    def __init__(self, *touched: Tensor) -> None:
        """touched: what the launches change for good, put back after the recording as if they had not run."""
        super().__init__()
        self._touched = touched
        self._again: list[Callable[[], None]] = []
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self._again, before = [], [x.clone() for x in self._touched]
        with launch.recorded(self._launched), self:
            numbers = run()
        for x, old in zip(self._touched, before, strict=True):
            x.copy_(old)
        self.captures += 1
        again = self._again
        numbers.fill_(float("nan"))  # a replay must write it

        def replay() -> None:
            self.replays += 1
            for each in again:
                each()

        return replay, numbers

    def _launched(self, noted: launch.Launch) -> bool:
        kernel, grid, arguments, constants = noted

        def again() -> None:
            with _disable_current_modes():
                kernel[grid](*arguments, **constants)

        again()
        self._again.append(again)
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        is_view = not written and any(r.alias_info is not None for r in func._schema.returns)
        if is_view or func.overloadpacket._qualified_op_name.startswith(("aten::empty", "aten::detach", "aten::sym_")):
            return result

        def again() -> None:
            new = func(*args, **kwargs)
            if not written:
                news, results = (x if isinstance(x, tuple) else (x,) for x in (new, result))
                for x, into in zip(news, results, strict=True):
                    into.copy_(x)

        self._again.append(again)
        return result


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter (TRITON_INTERPRET=1)")
@pytest.mark.parametrize(("family", "weights", "policy", "template"), [
    ("qwen3", "compute", "mlp", "after"),
    pytest.param("mistral", "int8", "layer", "plain", marks=pytest.mark.slow),
    pytest.param("llama", "int4", "all", "both", marks=pytest.mark.slow),
    pytest.param("qwen2", "compute", "layer", "system", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_replayed_step_is_the_plain_one(
    tmp_path: Path, family: str, weights: str, policy: str, template: str
) -> None:
    sizes = {"sliding_window": 5} if family == "mistral" else {}
    write_folder(tmp_path, family, num_hidden_layers=2, intermediate_size=32, **sizes)
    model = load_model(tmp_path, weights=weights, device="cpu", backend="triton")
    prompt = SoftPrompt.from_ids(model, [9, 30, 200], template=TEMPLATES[template])
    queries = itertools.cycle([[10, 11, 12], [10, 11], [13], [10, 14, 15, 16]])
    targets = itertools.cycle([[20], [20, 21]])
    taken = [
        batch_of(model, prompt, [Example(next(queries), next(targets), 1.0 + i) for i in range(2 + n % 2)])
        for n in range(3)
    ]
    plain = trainer(model, prompt, [], policy)
    recording = Recording()
    captured = trainer(model, prompt, taken, policy, recording)
    recording._touched = (captured._state, captured._before, captured._alive)
    captured._runner._sizes = [_larger(size, captured._runner._sizes) for size in captured._runner._sizes[-1:]]
    assert_same(plain, captured, taken)
    assert (recording.captures, recording.replays) == (1, 2)
    model.release_memory()  # the arena moves: what was captured knows places that are gone
    before = captured.state()[0]
    assert bool(step(captured, taken[0], 4).report.alive)
    assert (recording.captures, recording.replays) == (2, 3)
    assert not torch.equal(captured.state()[0], before)
    captured.take_back()
    assert torch.equal(captured.state()[0], before)


def test_where_nothing_can_be_captured_launches_go_one_by_one_with_a_line(tmp_path: Path) -> None:
    write_folder(tmp_path, "llama")
    model = load_model(tmp_path, device="cpu")
    prompt = SoftPrompt.from_ids(model, [9, 30], template=TEMPLATES["system"])
    taken = [batch_of(model, prompt, [Example([10, 11 + n], [20])]) for n in range(3)]

    def refused(run: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    failing, static = trainer(model, prompt, taken, "all", refused), trainer(model, prompt, taken, "all", static=True)
    with pytest.warns(GraphWarning, match="launches go one by one: operation not permitted when stream is capturing$"):
        found = [step(failing, batch, n).loss for n, batch in enumerate(taken, start=1)]
    assert found == [step(static, batch, n).loss for n, batch in enumerate(taken, start=1)]
    assert all(torch.equal(x, y) for x, y in zip(failing.state(), static.state(), strict=True))


sizes = st.builds(
    PassSize, st.integers(1, 400), st.integers(0, 9), st.integers(1, 20), st.integers(1, 9), st.integers(1, 30),
    st.booleans(),
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(sizes, min_size=1, max_size=40))
def test_every_pass_fits_a_class_and_little_is_padding(drawn: list[PassSize]) -> None:
    classes = size_classes(drawn)
    assert classes == sorted(classes, key=lambda each: each.tokens)
    padding = 0
    for size in drawn:
        into = fitting(size, classes)
        assert into is not None
        assert into.tokens > size.tokens
        assert not into.in_order or size.in_order
        padding += into.tokens - 1 - size.tokens
    assert padding <= WASTE * sum(size.tokens for size in drawn)


def test_many_sizes_need_few_classes() -> None:
    drawn = [PassSize(5000 + 37 * n % 1000, 0, 9, 9, 9) for n in range(1000)]
    assert len(size_classes(drawn)) <= 4
