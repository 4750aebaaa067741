"""sample -> advance in turn: the answers are those of a plain loop over the Python reference, on either device."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.backends.native_core import AdvanceBatch, SamplingBatch, SamplingParams
from embedgrad.generation.constrained import ForcedChoice
from embedgrad.generation.sampler import Penalties, choose_token
from embedgrad.generation.sampling import Sampling
from tests.csrc.core import STATUS, Core, P, params_of, pointer

V, CAPACITY = 12, 10
REASONS = ("running", "stop", "length", "context", "failed")
STOP = (3, 4)


def model(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Stands for a decode step: logits [B, V] that depend on each row's token and position."""
    seeds = tokens.astype(np.int64) * 1000 + positions
    return np.stack([np.random.default_rng(int(s)).normal(0, 1.5, V) for s in seeds]).astype(np.float32)


@dataclass
class Setup:
    """What a generation is given; B rows with queries of `lengths` tokens."""

    lengths: list[int]
    sampling: Sampling
    penalties: Penalties
    max_new_tokens: int
    max_position: int
    tree: ForcedChoice | None = None
    nodes: list[int] = field(default_factory=list)


def plainly(setup: Setup) -> list[tuple[list[int], str]]:
    """Ids and stop reason of each row, one row after another."""
    answers = []
    for row, length in enumerate(setup.lengths):
        ids: list[int] = []
        token, position, node = row % V, length - 1, setup.nodes[row] if setup.nodes else -1
        counts = np.zeros(V, np.int64)
        while True:
            logits = model(np.array([token]), np.array([position]))[0]
            candidates = setup.tree.candidates(node) if setup.tree and node >= 0 else None
            token = choose_token(
                logits, setup.sampling, stream=row, step=len(ids), penalties=setup.penalties, counts=counts,
                candidates=candidates,
            )  # fmt: skip
            if token in STOP:
                reason = "stop"
                break
            ids.append(token)
            counts[token] += 1
            position += 1
            if setup.tree and node >= 0:
                node = setup.tree.follow(node, token)
                if not setup.tree.candidates(node):
                    reason = "stop"
                    break
            if len(ids) == setup.max_new_tokens:
                reason = "length"
                break
            if length + len(ids) >= setup.max_position:
                reason = "context"
                break
        answers.append((ids, reason))
    return answers


def on_device(core: Core, device: str, setup: Setup) -> list[tuple[list[int], str]]:
    """The same as a captured graph would run it: the host looks at nothing but the number of running rows."""
    rows = len(setup.lengths)
    zeros = lambda *shape, kind=np.int32: np.zeros(shape, kind)  # noqa: E731
    state = {
        "tokens": zeros(rows), "status": zeros(rows), "ids": zeros(rows, CAPACITY), "lengths": zeros(rows),
        "inputs": np.arange(rows, dtype=np.int32) % V, "positions": np.array(setup.lengths, np.int32) - 1,
        "steps": zeros(rows, kind=np.uint32), "counts": zeros(rows, V), "reasons": zeros(rows),
        "running": np.array([rows], np.int32),
    }  # fmt: skip
    tree = setup.tree
    nodes = None if tree is None else np.array(setup.nodes, np.int32)
    streams, stop = np.arange(rows, dtype=np.uint64), np.array(STOP, np.int32)
    params = (SamplingParams * rows)(*[params_of(setup.sampling, setup.penalties)] * rows)
    most = np.full(rows, setup.max_new_tokens, np.int32)
    at = {name: pointer(array) for name, array in state.items()}
    shared = {
        "sequences": rows, "vocabulary": V, "nodes": pointer(nodes),
        "children": None if tree is None else pointer(tree.children),
        "child_tokens": None if tree is None else pointer(tree.child_tokens),
        **{name: at[name] for name in ("tokens", "status", "counts", "steps", "reasons")},
    }  # fmt: skip
    advance = AdvanceBatch(
        **shared, capacity=CAPACITY, max_new_tokens=pointer(most), max_position=setup.max_position,
        stop_size=len(STOP), stop_tokens=P(stop.ctypes.data),
        child_nodes=None if tree is None else pointer(tree.child_nodes),
        **{name: at[name] for name in ("ids", "lengths", "inputs", "positions", "running")},
    )  # fmt: skip
    for _ in range(CAPACITY + 1):
        if state["running"][0] == 0:
            break
        logits = model(state["inputs"], state["positions"])
        batch = SamplingBatch(
            **shared, params=ctypes.addressof(params), logits=pointer(logits), logits_stride=V, streams=pointer(streams)
        )
        assert core.raw_sample(device, batch) == 0
        core.advance(device, advance)
        assert core.emulation_error() == ""
    assert state["running"][0] == 0
    return [
        (ids[:n].tolist(), REASONS[reason])
        for ids, n, reason in zip(state["ids"], state["lengths"], state["reasons"], strict=True)
    ]


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=5))
    tree, nodes = None, []
    if draw(st.booleans()):
        continuation = st.lists(st.integers(5, V - 1), min_size=1, max_size=4)
        tree = ForcedChoice.among(draw(st.lists(continuation, min_size=1, max_size=5)), end=STOP[0])
        nodes = draw(st.lists(st.sampled_from([0, -1]), min_size=len(lengths), max_size=len(lengths)))
    return Setup(
        lengths,
        Sampling(temperature=draw(st.sampled_from([0, 0.7])), top_k=draw(st.sampled_from([0, 5])), seed=len(lengths)),
        Penalties(draw(st.sampled_from([1.0, 1.3])), 0.1, 0.2),
        draw(st.integers(1, CAPACITY)),
        draw(st.integers(9, 14)),
        tree,
        nodes,
    )


@settings(max_examples=80, deadline=None)
@given(setups())
def test_whole_answers(core: Core, setup: Setup) -> None:
    expected = plainly(setup)
    for device in ("cpu", "cuda"):
        assert on_device(core, device, setup) == expected, device


def test_forced_answers_are_continuations(core: Core) -> None:
    continuations = [[5, 6], [5, 6, 7], [8], [8, 9, 10, 11]]
    tree = ForcedChoice.among(continuations, end=STOP[0])
    setup = Setup([2] * 60, Sampling(temperature=2), Penalties(), CAPACITY, 100, tree, [0] * 60)
    answers = on_device(core, "cpu", setup)
    assert {tuple(ids) for ids, _ in answers} == {tuple(c) for c in continuations}
    assert {reason for _, reason in answers} == {"stop"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_row_that_cannot_be_sampled_ends_alone(core: Core, device: str) -> None:
    state = {name: np.zeros(2, np.int32) for name in ("ids", "lengths", "inputs", "positions", "steps", "reasons")}
    tokens, status = np.array([-1, 6], np.int32), np.array([STATUS.index("NaN"), 0], np.int32)
    running, most = np.array([2], np.int32), np.ones(2, np.int32)
    core.advance(
        device,
        AdvanceBatch(
            sequences=2, vocabulary=V, capacity=1, max_new_tokens=pointer(most), max_position=9, stop_size=0,
            tokens=pointer(tokens), status=pointer(status), running=pointer(running),
            **{name: pointer(array) for name, array in state.items()},
        ),
    )  # fmt: skip
    assert [REASONS[r] for r in state["reasons"]] == ["failed", "length"]
    assert state["ids"].tolist() == [0, 6]
    assert running[0] == 0


def test_forced_choice_merges_beginnings() -> None:
    tree = ForcedChoice.among([[7, 1], [7], [2, 2]], end=9)
    assert tree.candidates(0) == [2, 7]
    assert tree.candidates(tree.follow(0, 7)) == [1, 9]
    assert tree.candidates(tree.follow(tree.follow(0, 7), 9)) == []
